"""LoRA on a pretrained model: it starts as the base model, and is the same run under every strategy."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Options, Recipe, TensorData, option
from shardlaunch.text import from_config, from_source, pretrained_weights
from tests.distributed.ranks import run_on_ranks
from tests.recipes import losses, run_well

ARGV = ["--max-steps", "3", "--lr", "0.05", "--threads-per-rank", "1", "--optimizer", "adamw"]


@dataclass(kw_only=True)
class AdapterOptions(Options):
    """Options of the adapters' recipe."""

    model: str = ""
    """Folder of the base model."""
    is_from_pretrained: bool = False
    """Load it in model(), or return its weights from weights()."""
    adapt: bool = True
    """Train LoRA's adapters, or all of the base model."""
    global_batch_size: int = 8
    micro_batch_size: int = 2
    tracker: str = option("none", mark="free")


class Adapters(Recipe):
    """A causal model with LoRA by peft."""

    options: AdapterOptions

    def datasets(self) -> Mapping[str, Any]:
        return {"train": TensorData(input_ids=torch.randint(60, (24, 7), generator=torch.Generator().manual_seed(0)))}

    def model(self) -> nn.Module:
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM

        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        folder = self.options.model
        if self.options.is_from_pretrained:
            base = AutoModelForCausalLM.from_pretrained(folder)
        else:
            base = from_config(AutoModelForCausalLM, from_source(AutoConfig, folder), folder)
        if not self.options.adapt:
            return base  # type: ignore[no-any-return]
        adapted: nn.Module = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        return adapted

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        if self.options.is_from_pretrained:
            return {}
        stored = pretrained_weights(AutoModelForCausalLM, self.options.model)
        if not self.options.adapt:
            return stored
        return {f"base_model.model.{name.replace('q_proj', 'q_proj.base_layer')}": t for name, t in stored.items()}

    def num_targets(self, batch: Any) -> int:
        return int(batch["input_ids"][:, 1:].numel())

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"][:, :-1]).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum")


def _run(argvs: list[list[str]]) -> None:
    for argv in argvs:
        run_well(Adapters, argv)


def test_adapters_start_as_the_base_model_under_every_strategy(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=16, **size)).save_pretrained(tmp_path / "base")

    def argv(name: str, *words: str) -> list[str]:
        return [*ARGV, "--model", str(tmp_path / "base"), "--output-dir", str(tmp_path / name), *words]

    loaded = ("--is-from-pretrained", "--strategy")
    run_on_ranks(1, _run, [argv("base", "--no-adapt"), argv("single"), argv("single-loaded", *loaded, "single")])
    several = ("ddp", "fsdp2", "zero3")
    run_on_ranks(2, _run, [argv(name, "--strategy", name) for name in several] + [argv("loaded", *loaded, "fsdp2")])
    expected = losses(tmp_path / "single")
    assert expected[1] == losses(tmp_path / "base")[1]
    assert len(set(expected.values())) == 3
    for name in several:
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-6), name
    from_pretrained = losses(tmp_path / "single-loaded")  # without draws for the base model, the adapters' are others
    assert from_pretrained[1] == expected[1]
    assert losses(tmp_path / "loaded") == pytest.approx(from_pretrained, abs=1e-6)

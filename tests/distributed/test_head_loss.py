"""The loss inside the output layer: that of all logits, on any ranks; models that it does not fit."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from shardlaunch import UserError
from shardlaunch.launcher.toolkit import head_loss
from shardlaunch.text import NO_TARGET, prepare_head, require_logits_of_head, sum_of_losses
from tests.distributed.ranks import run_on_ranks
from tests.recipes import final_tensors, losses, recipe_class, run_quietly, run_well

ARGV = (
    *("--preset", "demo", "--vocab-size", "300", "--context-length", "32", "--layers", "1", "--width", "32"),
    *("--max-steps", "4", "--eval-every", "4", "--global-batch-size", "12", "--micro-batch-size", "4"),
    *("--eval-micro-batch-size", "32", "--tracker", "none", "--threads-per-rank", "1", "--save-every", "0"),
)


def _runs(folder: Path, jobs: list[tuple[str, tuple[str, ...]]]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    head_loss.TOKENS_AT_ONCE = 48  # several pieces per micro-batch, the last one smaller
    for name, words in jobs:
        run_well(recipe_class("gpt_lm"), [*ARGV, "--output-dir", str(folder / name), *words])


def test_losses_are_those_of_all_logits(tmp_path: Path) -> None:
    chunked = ("--chunked-loss",)
    alone = [("plain", ()), ("one", chunked), ("bf16", ("--precision", "bf16")), ("fp16", ("--precision", "fp16"))]
    alone += [(f"{name}-chunked", (*words, *chunked)) for name, words in alone[2:]]
    alone += [("resumed", (*chunked, "--stop-at-step", "2")), ("resumed", chunked)]
    run_on_ranks(1, _runs, tmp_path, alone)
    run_on_ranks(2, _runs, tmp_path, [("zero3", (*chunked, "--strategy", "zero3")), ("ddp", chunked)])
    run_on_ranks(3, _runs, tmp_path, [("fsdp2", (*chunked, "--strategy", "fsdp2"))])
    found = {folder.name: losses(folder) for folder in tmp_path.iterdir()}
    for name in ("one", "zero3", "ddp", "fsdp2", "resumed"):
        assert found[name] == pytest.approx(found["plain"], abs=2e-6), name
    for name in ("bf16", "fp16"):
        assert found[f"{name}-chunked"] == pytest.approx(found[name], abs=5e-3), name
    assert found["resumed"] == found["one"]
    ended, whole = final_tensors(tmp_path / "resumed"), final_tensors(tmp_path / "one")
    assert all(torch.equal(ended[name], tensor) for name, tensor in whole.items())


def _small(config_type: type[PreTrainedConfig], **values: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_type(**{**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, **values})
    return AutoModelForCausalLM.from_config(config)


def _ids() -> torch.Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("config_type", "values"),
    [(Gemma2Config, {}), (Cohere2Config, {"logit_scale": 0.5}), (GraniteConfig, {"logits_scaling": 8.0})],
)
def test_models_that_change_their_logits_are_refused(config_type: type[PreTrainedConfig], values: Any) -> None:
    model = _small(config_type, **values)
    prepare_head(model)
    with pytest.raises(UserError, match="--chunked-loss: this model changes the logits"):
        require_logits_of_head(model, input_ids=_ids())


def test_models_that_return_what_their_output_layer_does() -> None:
    model = _small(LlamaConfig)
    targets = _ids().roll(-1, 1)
    targets[:, -1] = NO_TARGET
    logits = model(_ids()).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    prepare_head(model)
    before = torch.get_rng_state()
    require_logits_of_head(model, input_ids=_ids())
    assert torch.equal(torch.get_rng_state(), before)
    loss = sum_of_losses(model, targets, input_ids=_ids())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(gradients, wanted, strict=True))
    assert torch.equal(model(_ids()).logits, logits), "without targets it is an output layer"


def test_output_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a linear output layer, and that of Linear is not known"):
        prepare_head(nn.Linear(2, 2))
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="that of GPT2LMHeadModel is a Sequential"):
        prepare_head(model)
    argv = [*ARGV, "--output-dir", str(tmp_path / "out"), "--chunked-loss", "--tensor-parallel", "2"]
    status, output = run_quietly(recipe_class("gpt_lm"), argv)
    assert status == 2
    assert "--chunked-loss: not with --tensor-parallel" in output

"""Adapters that can have no effect are named: those without a gradient, and those of too large a rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_on_ranks
from tests.lora_recipe import NUM_CLASSES, Tokens, TokensOptions, save_base
from tests.recipes import run_quietly, run_well

pytest.importorskip("peft", reason="the extra `lora` is not installed")
LAST_LAYER = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
IDLE = f"no gradient has arrived in the first update at 7 of 14 adapters: {', '.join(LAST_LAYER)}"


@dataclass(kw_only=True)
class PartlyOptions(TokensOptions):
    """Options of the recipe."""

    layers: int = 1
    """Layers that the loss depends on; 0: on the head alone."""


class PartlyUsed(Tokens):
    """Classify by the states of the first layers, or with a head on states that are detached."""

    options: PartlyOptions

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        outputs: Any = model(input_ids=batch["input_ids"], output_hidden_states=True)
        states = outputs.hidden_states[self.options.layers]
        logits: torch.Tensor = states[:, -1, :NUM_CLASSES]
        if not self.options.layers:
            head: Any = model.get_submodule("score")
            logits = head(states[:, -1].detach())
        return logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("idle") / "base")


def _argv(base: Path, run: Path, *words: str) -> list[str]:
    return ["--model", str(base), "--output-dir", str(run), "--max-steps", "2", "--lora-rank", "2", *words]


def _outputs(argvs: Sequence[Sequence[str]]) -> list[str]:
    return [run_well(PartlyUsed, list(argv)).replace("\n", " ") for argv in argvs]


def test_adapters_without_a_gradient_are_named_once_under_every_strategy(base: Path, tmp_path: Path) -> None:
    names = ("ddp", "fsdp2", "zero2")
    outputs, _ = run_on_ranks(2, _outputs, [_argv(base, tmp_path / name, "--strategy", name) for name in names])
    assert [output.count(IDLE) for output in outputs] == [1, 1, 1]
    assert "name the others with --lora-targets" in outputs[0]


def test_a_resume_is_silent_and_adapters_that_all_learn_are_too(base: Path, tmp_path: Path) -> None:
    first, second, all_learn = _outputs(
        [
            _argv(base, tmp_path / "run", "--stop-at-step", "1"),
            _argv(base, tmp_path / "run"),
            _argv(base, tmp_path / "all", "--layers", "2"),
        ]
    )
    assert [IDLE in output for output in (first, second, all_learn)] == [True, False, False]
    assert "no gradient" not in all_learn
    assert "smaller dimension" not in all_learn


def test_other_looks_at_steps_go_on(base: Path, tmp_path: Path) -> None:
    (output,) = _outputs([_argv(base, tmp_path, "--max-steps", "5", "--profile", "1")])
    assert IDLE in output
    assert list((tmp_path / "profile").iterdir())


def test_a_run_of_which_no_adapter_learns_is_refused(base: Path, tmp_path: Path) -> None:
    status, output = run_quietly(PartlyUsed, _argv(base, tmp_path / "run", "--layers", "0"))
    assert status == 2
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: --lora-rank: no gradient has arrived in the first update at 14 of 14 adapters")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_rank_above_the_smaller_dimension_of_a_layer_is_said(base: Path, tmp_path: Path) -> None:
    (output,) = _outputs([_argv(base, tmp_path / "run", "--lora-rank", "20", "--layers", "2")])
    assert "--lora-rank 20: more than the smaller dimension of model.layers.0.self_attn.q_proj" in output
    (output,) = _outputs([_argv(base, tmp_path / "full", "--lora-rank", "16", "--layers", "2")])
    assert "smaller dimension" not in output

"""Freezing up to a step, learning rates by name, weight decay and L1: the same on every strategy and after a resume."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_on_ranks
from tests.recipes import NetRecipe, final_tensors, losses, run_well, training_lines

BOUND = 1e-6
UNFREEZE, STEPS = 5, 9
ARGV = [
    *("--max-steps", str(STEPS), "--freeze", "first.*", "norm.*", "--unfreeze-at-step", str(UNFREEZE)),
    *("--lr-factors", "last.*=0.5", "first.*=0.1", "--weight-decay", "0.1", "--l1", "0.1", "--lr", "0.01"),
    *("--schedule", "cosine", "--warmup-steps", "2", "--threads-per-rank", "1", "--eval-every", "100"),
]


def _run(num_ranks: int, output_dir: Path, *options: str) -> str:
    argv = [*ARGV, "--output-dir", str(output_dir), *options]
    output: str = run_on_ranks(num_ranks, run_well, NetRecipe, argv)[0]
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("freezing") / "single"
    output = _run(1, output_dir, "--save-every", "1", "--keep", "0")
    assert "frozen" in output
    assert f"step {UNFREEZE}: unfroze all parameters" in output
    return output_dir


def _weights(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output_dir / "checkpoints" / f"step-{step:08}" / "model-00001-of-00001.safetensors")


def test_frozen_parameters_and_norms_stand_still_until_they_are_trained(reference: Path) -> None:
    first, at_unfreeze, last = (_weights(reference, step) for step in (1, UNFREEZE, STEPS))
    moved = {name for name in first if not torch.equal(first[name], at_unfreeze[name])}
    assert not {name.partition(".")[0] for name in moved} & {"first", "norm"}
    assert {"middle.weight", "last.bias"} <= moved
    later = {name for name in first if not torch.equal(at_unfreeze[name], last[name])}
    assert {"first.weight", "norm.weight", "norm.running_mean"} <= later


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_the_run_is_the_same_under_every_strategy(strategy: str, reference: Path, tmp_path: Path) -> None:
    _run(2, tmp_path, "--strategy", strategy)
    expected, found = losses(reference), losses(tmp_path)
    assert max(abs(expected[step] - found[step]) for step in expected) <= BOUND
    tensors, others = final_tensors(reference), final_tensors(tmp_path)
    assert tensors.keys() == others.keys()
    # Adam divides by the root of what can be next to nothing, and L1 cuts at 0: hence the wider bound.
    assert max((tensors[key].double() - others[key].double()).abs().max().item() for key in tensors) <= 1e-4


class OwnOptimizer(NetRecipe):
    """The net with its own optimizer() and one parameter group."""

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for _, parameter in parameters], lr=self.options.lr)


def test_an_optimizer_of_the_recipes_own(tmp_path: Path) -> None:
    argv = [*ARGV[: ARGV.index("--lr-factors")], "--threads-per-rank", "1", "--eval-every", "100"]
    for num_ranks, strategy in ((1, "single"), (2, "zero1")):
        words = [*argv, "--output-dir", str(tmp_path / strategy), "--strategy", strategy]
        run_on_ranks(num_ranks, run_well, OwnOptimizer, words)
    expected, found = losses(tmp_path / "single"), losses(tmp_path / "zero1")
    assert max(abs(expected[step] - found[step]) for step in expected) <= BOUND


@pytest.mark.parametrize("strategy", ["single", "fsdp2", "zero3"])
def test_a_resume_before_at_and_after_unfreezing_is_exact(strategy: str, reference: Path, tmp_path: Path) -> None:
    num_ranks = 1 if strategy == "single" else 2
    run = partial(_run, num_ranks)
    whole = reference
    if num_ranks > 1:
        whole = tmp_path / "whole"
        run(whole, "--strategy", strategy)
    for stop in (UNFREEZE - 2, UNFREEZE, UNFREEZE + 2):
        run(tmp_path / "stopped", "--strategy", strategy, "--stop-at-step", str(stop))
    run(tmp_path / "stopped", "--strategy", strategy)
    assert training_lines(tmp_path / "stopped") == training_lines(whole)
    tensors, others = final_tensors(whole), final_tensors(tmp_path / "stopped")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)

"""The average of the weights on several ranks: the same under every strategy, and evaluated without a trace."""

from pathlib import Path

import pytest
import torch

from shardlaunch.launcher.reporting.tracking import EVAL_PREFIXES
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NetRecipe, bits, final_tensors, run_well, training_lines

BOUND = 1e-6
ARGV = [
    *("--max-steps", "8", "--eval-every", "3", "--save-every", "5", "--ema-half-life", "60", "--optimizer", "sgd"),
    *("--lr", "0.05", "--momentum", "0.9", "--threads-per-rank", "1"),
]


def _run(num_ranks: int, output_dir: Path, *words: str) -> str:
    argv = [*ARGV, "--output-dir", str(output_dir), *words]
    output: str = run_on_ranks(num_ranks, run_well, NetRecipe, argv)[0]
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("averages") / "single"
    output = _run(1, output_dir)
    assert "exponential, half-life 60 samples; 2.5 kB more per rank" in output
    return output_dir


@pytest.mark.parametrize(("strategy", "num_ranks"), [("ddp", 3), ("fsdp2", 3), ("zero2", 2), ("zero3", 2)])
def test_losses_metrics_and_averages_are_the_same(
    strategy: str, num_ranks: int, reference: Path, tmp_path: Path
) -> None:
    """Also the losses after an evaluation of the average, of which nothing may stay gathered."""
    words = ("--no-reshard-after-forward",) if strategy == "fsdp2" else ()
    output = _run(num_ranks, tmp_path, "--strategy", strategy, *words)
    assert ("more per rank, sharded as the optimizer's state is" in output) is (strategy != "ddp")
    lines = zip(training_lines(reference), training_lines(tmp_path), strict=True)
    compared = set()
    for expected, found in lines:
        names = [name for name in expected if name == "loss" or name.startswith(EVAL_PREFIXES)]
        assert all(abs(expected[name] - found[name]) <= BOUND for name in names)
        compared |= set(names)
    assert compared == {"loss", *(f"{prefix}{name}" for prefix in EVAL_PREFIXES for name in ("loss", "accuracy"))}
    tensors, others = final_tensors(reference), final_tensors(tmp_path)
    assert tensors.keys() == others.keys()
    averages = [key for key in tensors if key.startswith("ema/")]
    assert "ema/norm.running_mean" in averages
    assert all((tensors[key] - others[key]).abs().max().item() <= BOUND for key in averages)


def test_with_exact_they_have_the_same_bits_through_changes_of_ranks(tmp_path: Path) -> None:
    for name, starts in {
        "one": [(1, "single", "0")],
        "changed": [(2, "ddp", "4"), (3, "fsdp2", "0")],
    }.items():
        for num_ranks, strategy, stop in starts:
            _run(num_ranks, tmp_path / name, "--strategy", strategy, "--stop-at-step", stop, "--exact")
    one, changed = (bits(tmp_path / name) for name in ("one", "changed"))
    assert one == changed
    assert any(key.startswith("ema/") for key in one[2])


def test_a_resume_of_sharded_averages_is_exact(tmp_path: Path) -> None:
    words = ("--strategy", "fsdp2", "--freeze", "first.*", "norm.*", "--unfreeze-at-step", "5")
    _run(2, tmp_path / "whole", *words)
    for stop in ("4", "0"):
        _run(2, tmp_path / "stopped", *words, "--stop-at-step", stop)
    assert training_lines(tmp_path / "whole") == training_lines(tmp_path / "stopped")
    tensors, others = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "stopped")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert "ema/first.weight" in tensors

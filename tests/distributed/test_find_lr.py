"""The search for a learning rate: the same losses and the same suggestion on any ranks, and nothing is left."""

from pathlib import Path

import pytest

from shardlaunch.checkpoints.records import read_record
from shardlaunch.launcher.commands.find_lr.curve import CurveRecord, Request, suggest
from shardlaunch.launcher.commands.find_lr.ranks import train_rising
from shardlaunch.launcher.launch import main
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NetRecipe

REQUEST = Request(low=1e-4, high=100.0, steps=40)


def _find(folder: Path, *argv: str) -> None:
    words = ["--output-dir", str(folder / "run"), "--lr", str(REQUEST.high), "--max-steps", str(REQUEST.steps), *argv]
    words += ["--schedule", "cosine", "--on-nonfinite", "skip"]
    status = main(NetRecipe, words, lambda run: train_rising(run, REQUEST, folder / "curve.json"))
    assert status == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> CurveRecord:
    """Return the curve on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run_on_ranks(1, _find, folder)
    assert not list((folder / "run" / "checkpoints").iterdir())
    assert not (folder / "run" / "metrics.jsonl").exists()
    return read_record(folder / "curve.json", CurveRecord)


def test_the_rate_rises_whatever_the_schedule_until_the_loss_diverges(alone: CurveRecord) -> None:
    assert alone.lrs == pytest.approx([REQUEST.rate(step) for step in range(len(alone.lrs))])
    assert alone.has_diverged
    assert 10 < len(alone.losses) < REQUEST.steps
    assert suggest(alone.lrs, alone.losses).lr is not None


@pytest.mark.parametrize(("num_ranks", "strategy"), [(2, "ddp"), (3, "fsdp2")])
def test_losses_and_suggestion_are_the_same_on_any_ranks(
    tmp_path: Path, alone: CurveRecord, num_ranks: int, strategy: str
) -> None:
    run_on_ranks(num_ranks, _find, tmp_path, "--strategy", strategy)
    found = read_record(tmp_path / "curve.json", CurveRecord)
    expected = suggest(alone.lrs, alone.losses)
    assert suggest(found.lrs, found.losses).lr == expected.lr
    assert expected.lowest_lr is not None
    count = alone.lrs.index(expected.lowest_lr) + 1  # above that rate, steps amplify the rounding of sums
    assert found.losses[:count] == pytest.approx(alone.losses[:count], rel=1e-6)


def test_a_loss_that_is_not_finite_ends_it_on_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(2, _find, tmp_path, "--precision", "bf16", "--max-grad-norm", "0")
    found = read_record(tmp_path / "curve.json", CurveRecord)
    assert found.has_diverged
    assert suggest(found.lrs, found.losses).lr is not None

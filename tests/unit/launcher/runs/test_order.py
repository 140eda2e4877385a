"""The order of batches in a run's identity: old runs keep theirs, and lengths that do not fit are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardlaunch import TensorData
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import IdentityRecord
from shardlaunch.launcher.runs.run import Run
from tests.launch.checks import flip_byte
from tests.recipes import NetRecipe, losses, run_quietly, run_well

ARGV = ("--epochs", "3", "--log-every", "1", "--save-every", "0", "--eval-every", "1000", "--threads-per-rank", "1")
KEEPS = "this run began in the order of batches of an earlier version, and keeps it"
FORMER, ORDER = "digest of the batch plan", "order of the batches"


def _train(folder: Path, *argv: str) -> str:
    return run_well(NetRecipe, [*ARGV, "--output-dir", str(folder), *argv])


def _identity(folder: Path) -> dict[str, Any]:
    identity: dict[str, Any] = json.loads((folder / "run.json").read_text())["identity"]
    return identity


def test_a_run_that_began_in_the_former_order_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, cut, elsewhere, new = (tmp_path / name for name in ("straight", "cut", "elsewhere", "new"))
    with monkeypatch.context() as patch:  # the order that runs of earlier versions have
        patch.setattr(Run, "_find_checkpoint", _in_former_order(Run._find_checkpoint))
        _train(straight)
        _train(cut, "--stop-at-step", "9")
    assert FORMER in _identity(cut)
    step_dir = cut / "checkpoints" / "step-00000009"
    assert KEEPS in _train(elsewhere, "--resume", str(step_dir))
    assert KEEPS in _train(cut)
    expected = losses(straight)
    assert len(expected) == 21
    assert losses(cut) == expected
    assert losses(elsewhere) == {step: loss for step, loss in expected.items() if step > 9}
    assert KEEPS in _train(cut, "--extend-to-steps", "22"), "the resume is of the same run"
    assert _identity(cut) == _identity(straight)
    flip_byte(cut, 22)
    said = _train(cut, "--extend-to-steps", "22")  # reading finds it, and another checkpoint is looked for
    assert said.count(KEEPS) == 1, said
    assert "step-00000022" in said, said
    assert KEEPS not in _train(new)
    assert losses(new) != expected
    assert FORMER not in _identity(new)
    assert _identity(new)[ORDER].startswith("version 2, ")


def test_another_run_in_the_former_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_find_checkpoint", _in_former_order(Run._find_checkpoint))
        _train(tmp_path / "run", "--stop-at-step", "2")
    status, output = run_quietly(NetRecipe, [*ARGV, "--output-dir", str(tmp_path / "run"), "--seed", "1"])
    assert status == 2
    assert f"it holds another run (--seed: 0 -> 1, {FORMER}: '" in output


def _in_former_order(find: Any) -> Any:
    def find_in_former_order(run: Run, **kwargs: Any) -> Checkpoint | None:
        run.identity = run.identity.in_order_of(IdentityRecord(identity={FORMER: ""}, warn={}))
        run.data = run.data.in_former_order()
        checkpoint: Checkpoint | None = find(run, **kwargs)
        return checkpoint

    return find_in_former_order


@pytest.mark.parametrize("change", [lambda found: found[:-1], lambda found: found[:, None], lambda found: found * 1j])
def test_lengths_that_do_not_fit_are_refused(tmp_path: Path, change: Any) -> None:
    class Lengths(NetRecipe):
        def lengths(self, dataset: TensorData) -> np.ndarray:
            lengths = super().lengths(dataset)
            assert lengths is not None
            changed: np.ndarray = change(lengths)
            return changed

    status, output = run_quietly(Lengths, [*ARGV, "--output-dir", str(tmp_path / "run")])
    assert status == 2
    assert "the recipe's lengths() must return one number per sample, for 203 samples; it returned" in output
    assert "Traceback" not in output


def test_lists_of_lengths_are_taken(tmp_path: Path) -> None:
    class Lists(NetRecipe):
        def lengths(self, dataset: TensorData) -> Any:
            lengths = super().lengths(dataset)
            assert lengths is not None
            return lengths.tolist()

    argv = [*ARGV, "--stop-at-step", "2", "--output-dir"]
    for recipe, name in ((NetRecipe, "array"), (Lists, "list")):
        run_well(recipe, [*argv, str(tmp_path / name)])
    assert losses(tmp_path / "array") == losses(tmp_path / "list")


def test_equal_work_is_part_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output_dir = tmp_path / "run"
    _train(output_dir, "--stop-at-step", "2", "--equal-work")
    status, output = run_quietly(NetRecipe, [*ARGV, "--output-dir", str(output_dir)])
    assert status == 2
    assert f"it holds another run ({ORDER}: 'version 2, " in output
    assert ", equal work' -> 'version 2, " in output
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_find_checkpoint", _in_former_order(Run._find_checkpoint))
        _train(tmp_path / "former", "--stop-at-step", "2")
    status, output = run_quietly(NetRecipe, [*ARGV, "--output-dir", str(tmp_path / "former"), "--equal-work"])
    assert status == 2
    assert "it holds another run (" in output


def test_equal_work_needs_lengths(tmp_path: Path) -> None:
    class Short(NetRecipe):
        def lengths(self, dataset: TensorData) -> None:
            return None

    status, output = run_quietly(Short, [*ARGV, "--output-dir", str(tmp_path), "--equal-work"])
    assert status == 2
    assert "error: --equal-work: the recipe has no lengths() of samples; remove the option" in output

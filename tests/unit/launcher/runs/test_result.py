"""`Result` of output folders: newest checkpoints that are damaged, folds that are missing, other files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shardlaunch import fit
from shardlaunch.launcher.runs.result import Result
from tests.recipes import NetRecipe

SHORT: dict[str, Any] = {"max_steps": 4, "eval_every": 1, "threads_per_rank": 1, "tracker": "none"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result") / "run"
    fit(NetRecipe, output_dir=folder, save_every=1, keep=0, **SHORT)
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "no state", "other state", "short weights"])
def test_a_damaged_newest_checkpoint_is_skipped(damage: str, run_dir: Path) -> None:
    newest = run_dir / "checkpoints" / "step-00000004"
    manifest, state = newest / "manifest.json", newest / "trainer_state.json"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif damage == "no state":
        state.unlink()
    elif damage == "other state":
        state.write_bytes(b"x" * state.stat().st_size)
    else:
        (weights,) = newest.glob("model-*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1])
    result = Result.of_folder(run_dir)
    assert (result.step, result.is_finished) == (3, False)
    assert result.last_checkpoint == run_dir / "checkpoints" / "step-00000003"


def test_the_result_is_of_this_run_and_not_of_a_later_damaged_checkpoint(run_dir: Path) -> None:
    newest = run_dir / "checkpoints" / "step-00000004"
    (weights,) = newest.glob("model-*.safetensors")
    weights.write_bytes(bytes(len(weights.read_bytes())))  # of the right size: only the digest shows it
    shutil.rmtree(run_dir / "checkpoints" / "step-00000003")
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        result = fit(NetRecipe, output_dir=run_dir, save_every=1, keep=0, **SHORT, stop_at_step=3)
    assert (result.step, result.is_finished) == (3, False)
    assert result.last_checkpoint == run_dir / "checkpoints" / "step-00000003"


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "fold-notes").mkdir()
    result = Result.of_folder(tmp_path)
    assert (result.step, result.is_finished, result.last_checkpoint, result.folds) == (0, False, None, ())


def test_a_cross_validation_is_finished_when_all_of_its_folds_are(tmp_path: Path) -> None:
    result = fit(NetRecipe, folds=3, num_train=96, output_dir=tmp_path, **SHORT)
    assert (len(result.folds), result.is_finished) == (3, True)
    assert json.loads((tmp_path / "folds.json").read_text())["summary"]
    shutil.rmtree(tmp_path / "fold-3")
    (tmp_path / "folds.json").unlink()
    (tmp_path / "fold-of-mine").mkdir()
    interrupted = Result.of_folder(tmp_path)
    assert (len(interrupted.folds), interrupted.is_finished) == (2, False)

"""--save-to: checkpoints are copied to a second place as the run goes, and brought back from it."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from shardlaunch import UserError, fit
from shardlaunch.checkpoints.copying import copy_out
from shardlaunch.checkpoints.layout import CHECKPOINTS, step_dir_name
from shardlaunch.checkpoints.places import LocalPlace, committed_steps, place_at
from shardlaunch.launcher.runs import second_place
from tests.launch.checks import flip_byte
from tests.recipes import NetRecipe, final_tensors, training_lines
from tests.unit.checkpoints.saved import save_step

OPTIONS: dict[str, Any] = {"max_steps": 8, "eval_every": 3, "save_every": 2, "threads_per_rank": 1, "keep": 2}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(second_place, "RETRY_S", 0.01)
    monkeypatch.setattr(second_place, "LAST_RETRY_S", 0.01)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without a second place."""
    run_dir = tmp_path_factory.mktemp("without") / "run"
    fit(NetRecipe, output_dir=run_dir, **OPTIONS)
    return run_dir


def steps_at(url: str) -> list[int]:
    """Return the steps of the checkpoints in a run folder at a URL."""
    return committed_steps(place_at(url).child(CHECKPOINTS))


def assert_same(run_dir: Path, expected: Path) -> None:
    """Check that two runs have ended alike."""
    tensors, others = final_tensors(run_dir), final_tensors(expected)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert training_lines(run_dir) == training_lines(expected)


@pytest.mark.parametrize("url", ["memory://bucket/run", "{}/second", "file://{}/second"])
def test_a_run_goes_on_from_its_second_place(tmp_path: Path, without: Path, url: str) -> None:
    """All is brought back: the newest and the best checkpoint, and the log."""
    url, run_dir = url.format(tmp_path), tmp_path / "run"
    fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS, stop_at_step=5)
    assert steps_at(url) == [3, 4, 5]
    shutil.rmtree(run_dir)
    result = fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS)
    assert result.best_checkpoint is not None
    assert_same(run_dir, without)
    assert steps_at(url) == [3, 6, 8]
    assert set(place_at(url).names()) == {CHECKPOINTS, "metrics.jsonl", "run.json"}


def test_a_damaged_checkpoint_is_brought_back(tmp_path: Path, without: Path) -> None:
    url, run_dir = "memory://run", tmp_path / "run"
    fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS, stop_at_step=5)
    flip_byte(run_dir, 5)
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS)
    assert_same(run_dir, without)
    lines = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)


def test_a_place_that_fails_for_a_while_is_said_once(
    tmp_path: Path, without: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run_dir = "memory://run", tmp_path / "run"
    open_ = MemoryFileSystem._open
    left = [12]

    def fails_at_first(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and left[0]:
            left[0] -= 1
            raise ConnectionResetError("connection reset by peer")
        return open_(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", fails_at_first)
    monkeypatch.setattr(second_place, "LAST_TRIES", 99)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS)
    said = [str(one.message) for one in caught if "--save-to" in str(one.message)]
    assert len(said) in (0, 2), said  # none, if all was over before the next save
    assert all("connection reset" in text or "copied there again" in text for text in said)
    assert_same(run_dir, without)
    assert steps_at(url)[-1] == 8


def test_a_place_that_fails_to_the_end_is_one_error_and_the_same_command_copies(
    tmp_path: Path, without: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run_dir = "memory://run", tmp_path / "run"

    def fails(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        raise PermissionError("access denied")

    says = r"--save-to memory://run: the last checkpoint could not be .*access denied"
    with monkeypatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setattr(MemoryFileSystem, "_open", fails)
        patch.setattr(second_place, "is_there", fails)  # the disk of the first fails too
        with pytest.raises(UserError, match=says):
            fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS)
    assert_same(run_dir, without)
    assert steps_at(url) == []
    fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS)
    assert steps_at(url) == [8]


def test_another_run_in_the_second_place_is_refused(tmp_path: Path) -> None:
    url = "memory://run"
    fit(NetRecipe, output_dir=tmp_path / "one", save_to=url, **OPTIONS, stop_at_step=2)
    with pytest.raises(UserError, match="cannot resume memory://run: it holds another run"):
        fit(NetRecipe, output_dir=tmp_path / "two", save_to=url, **{**OPTIONS, "seed": 1})
    for wrong, says in (
        (str(tmp_path / "x" / ".." / "two"), "is the output folder"),
        ("nonsense://run", "Protocol not known"),
        ("sftp://me:secret@host/run", "has a password"),
    ):
        with pytest.raises(UserError, match=f"--save-to.*{says}") as caught:
            fit(NetRecipe, output_dir=tmp_path / "two", save_to=wrong, **OPTIONS)
        assert "secret" not in str(caught.value)


def test_a_copy_of_the_same_step_in_other_files_is_replaced(tmp_path: Path) -> None:
    """As of a run that went on with other ranks; and halves of copies go."""
    url, run_dir = str(tmp_path / "second"), tmp_path / "run"
    fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS, stop_at_step=4)
    there = tmp_path / "second" / CHECKPOINTS
    (there / step_dir_name(4) / "manifest.json").write_text("{}")
    (there / step_dir_name(4) / "model-00001-of-00002.safetensors").write_text("another")
    shutil.copytree(there / step_dir_name(4), there / step_dir_name(1))
    (there / step_dir_name(1) / "manifest.json").unlink()
    (there / step_dir_name(1) / "1_Pooling").mkdir()
    (there / ".staging-step-00000003").mkdir()
    fit(NetRecipe, output_dir=run_dir, save_to=url, **OPTIONS, stop_at_step=4)
    assert sorted(path.name for path in there.iterdir()) == [step_dir_name(step) for step in (3, 4)]
    assert not (there / step_dir_name(4) / "model-00001-of-00002.safetensors").exists()


def test_a_copy_that_was_broken_off_goes_on_with_what_is_there(tmp_path: Path) -> None:
    """Also with files in folders; one of other files is deleted, with the folders in it."""
    step_dir = save_step(tmp_path / "run", 4, files={"1_Pooling/config.json": "{}"})
    here, there = LocalPlace(step_dir), LocalPlace(tmp_path / "second" / step_dir.name)
    copy_out(step_dir, str(there.path))
    there.remove("manifest.json")
    second_place._make_way(here, there)
    assert "1_Pooling" in there.names()
    (there.path / "1_Pooling/other").touch()
    second_place._make_way(here, there)
    assert there.names() == []


def test_folds_have_folders_of_their_own(tmp_path: Path) -> None:
    url = "memory://run"
    options = {**OPTIONS, "max_steps": 2, "folds": 2}
    fit(NetRecipe, output_dir=tmp_path / "run", save_to=url, **options)
    assert [steps_at(f"{url}/fold-{fold}") for fold in (1, 2)] == [[2], [2]]

"""Errors that end a run started by `launch`."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import ExceptionWrapper

from shardlaunch import fit
from shardlaunch.checkpoints import files
from shardlaunch.launcher.launch import main
from tests.recipes import NetRecipe, final_tensors, run_quietly

STEPS = {"max_steps": 2, "eval_every": 9, "threads_per_rank": 1}


class LosesItsDatabase(NetRecipe):
    def datasets(self) -> Any:
        raise RuntimeError("the database: connection reset by peer")


class Rows:
    """Rows in files on a network, of which one cannot be read at first."""

    def __init__(self, points: Any, number: int, times: int) -> None:
        self.points, self.number, self.times = points, number, times

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, row: int) -> Any:
        if row == 7 and self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number), "/net/rows/7.png")
        return tuple(column[row] for column in self.points.columns.values())


class OnANetwork(NetRecipe):
    """A recipe whose data is on a network file system."""

    number, times = errno.ESTALE, 0

    def datasets(self) -> Any:
        return {"train": Rows(super().datasets()["train"], self.number, self.times)}

    def lengths(self, dataset: Any) -> None:
        return None

    def collate(self, samples: Any, seeds: Any) -> Any:
        inputs, labels = zip(*samples, strict=True)
        return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))


def test_one_rank_does_not_lose_contact_with_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the database"):
        main(LosesItsDatabase, ["--output-dir", str(tmp_path / "run")])


def test_data_that_cannot_be_read_for_a_moment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(OnANetwork, output_dir=tmp_path / "without", **STEPS)
    monkeypatch.setattr(OnANetwork, "times", 2)
    fit(OnANetwork, output_dir=tmp_path / "with", **STEPS)
    expected, found = final_tensors(tmp_path / "without"), final_tensors(tmp_path / "with")
    assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_data_that_cannot_be_read_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(OnANetwork, "number", number)
    monkeypatch.setattr(OnANetwork, "times", 1000)
    status, output = run_quietly(OnANetwork, ["--output-dir", str(tmp_path / "run"), "--max-steps", "20"])
    assert status == 1
    (message,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"/net/rows/7.png: {os.strerror(number)} ({__file__}, line " in message
    assert "the same command resumes from the last checkpoint" in message
    assert "Traceback" not in output


def test_an_error_of_a_loading_process_is_a_line_too() -> None:
    try:
        raise OSError(errno.EIO, "Input/output error", "/net/rows/7.png")
    except OSError:
        passed_on = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(OSError, match="Original Traceback") as caught:
        passed_on.reraise()
    assert files.error_text(caught.value) == "/net/rows/7.png: Input/output error"

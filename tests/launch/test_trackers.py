"""What W&B, MLflow and trackio store of a run, offline: fresh, stopped, killed, resumed, and of a second run."""

import json
import os
import signal
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlaunch import Callback, Event, UserError, fit
from tests.distributed.ranks import run_on_ranks
from tests.recipes import LinearNet

STEPS, STOP, KILLED_AT = 12, 6, 10
SPEED = {"step_s", "samples_per_s", "memory_bytes"}


class Points(LinearNet):
    """The linear net, with the name of this file."""


class Shows(Callback):
    """Shows a picture, a text and a table at each evaluation."""

    def on_evaluation(self, event: Event) -> None:
        event.log_image("picture", torch.ones(3, 2, 2))
        event.log_text("words", "two words")
        event.log_table("numbers", ["a", "b"], [[event.step, "x"]])


class Killed(Points):
    """The same, killed at a step."""

    def schedule(self, step: int, num_steps: int) -> float:
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().schedule(step, num_steps)


def _fit(folder: str, name: str, tracker: str, *, killed: bool = False, **options: Any) -> None:
    """Train in a process of its own, without a network. On each rank."""
    os.environ |= {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file://{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": f"{folder}/trackio",
    }
    fit(
        Killed if killed else Points,
        **{"output_dir": f"{folder}/{name}", "project": "points", "tracker": tracker, "track_every": 1},
        **{"max_steps": STEPS, "eval_every": 4, "save_every": 4, **options},
    )


def _fits(folder: str, tracker: str) -> None:
    for name in ("one", "two"):
        _fit(folder, name, tracker, max_steps=4)


def _stop_and_resume(folder: Path, tracker: str) -> None:
    run_on_ranks(1, _fit_stopped, str(folder), tracker)
    run_on_ranks(1, _fit, str(folder), "stopped", tracker)


def _fit_stopped(folder: str, tracker: str) -> None:
    _fit(folder, "stopped", tracker, stop_at_step=STOP, callbacks=[Shows])


def _kill_and_resume(folder: Path, tracker: str) -> None:
    with pytest.raises(AssertionError, match="ended without an answer"):
        run_on_ranks(1, _fit_killed, str(folder), tracker)
    run_on_ranks(1, _fit, str(folder), "killed", tracker)


def _fit_killed(folder: str, tracker: str) -> None:
    _fit(folder, "killed", tracker, killed=True)


def _tracking_id(run_dir: Path) -> str:
    tracking_id: str = json.loads((run_dir / "run.json").read_text())["tracking_id"]
    return tracking_id


def _wandb_runs(run_dir: Path) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Return the record of the run and the logged rows of each of its offline folders, in order."""
    from wandb.proto import wandb_internal_pb2 as proto

    runs = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        run, rows = None, []
        for content in _leveldb_records(file.read_bytes()[7:], skipped=7):
            record = proto.Record()
            record.ParseFromString(content)
            if record.HasField("run"):
                run = record.run
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        runs.append((run, rows))
    return runs


def _leveldb_records(data: bytes, *, skipped: int) -> Iterator[bytes]:
    at, whole = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + skipped) % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b""


def test_wandb(tmp_path: Path) -> None:
    _stop_and_resume(tmp_path, "wandb")
    (first, rows), (second, more_rows) = _wandb_runs(tmp_path / "stopped")
    for run in (first, second):
        assert (run.project, run.display_name, run.run_id) == ("points", "stopped", _tracking_id(tmp_path / "stopped"))
    assert [row["_step"] for row in rows + more_rows] == list(range(1, STEPS + 1))
    assert rows[0].keys() >= {"loss", "lr", "grad_norm"} | SPEED
    assert "eval/accuracy" in more_rows[-1]
    (media,) = tmp_path.glob("stopped/wandb/offline-run-*/files/media")  # of the start with a callback
    assert len(list(media.glob("images/picture_4_*.png"))) == 1
    tables = [json.loads(path.read_text())["data"] for path in media.glob("table/*.table.json")]
    assert sorted(tables, key=len) in ([[["two words"]], [[4, "x"]]], [[[4, "x"]], [["two words"]]])

    run_on_ranks(1, _fits, str(tmp_path), "wandb")
    ((one, rows),), ((two, more_rows),) = _wandb_runs(tmp_path / "one"), _wandb_runs(tmp_path / "two")
    assert (one.display_name, two.display_name, len(rows), len(more_rows)) == ("one", "two", 4, 4)
    assert one.run_id != two.run_id


def test_mlflow(tmp_path: Path) -> None:
    _stop_and_resume(tmp_path, "mlflow")
    _kill_and_resume(tmp_path, "mlflow")
    run_on_ranks(1, _fits, str(tmp_path), "mlflow")
    found = run_on_ranks(1, _mlflow_runs, str(tmp_path))[0]
    assert found.keys() == {"stopped", "killed", "one", "two"}
    for name, (tags, params, steps) in found.items():
        assert tags["shardlaunch.tracking_id"] == _tracking_id(tmp_path / name)
        assert params["global_batch_size"] == "32"
        assert steps.keys() == {"loss", "lr", "grad_norm", "eval/loss", "eval/accuracy"} | SPEED
    whole = list(range(1, STEPS + 1))
    assert found["stopped"][2]["loss"] == whole
    shown = [path.name for path in tmp_path.glob("mlruns/**/artifacts/media/step-00000004/*")]
    assert sorted(shown) == ["numbers.csv", "picture.png", "words.txt"]
    # Killed after step 10 was logged, resumed from step 8: the last step logged before may be there twice.
    assert sorted(set(found["killed"][2]["loss"])) == whole
    assert len(found["killed"][2]["loss"]) <= STEPS + 1


def _mlflow_runs(folder: str) -> dict[str, tuple[dict[str, str], dict[str, str], dict[str, list[int]]]]:
    """Return tags, parameters, and the steps of each metric, of each run."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(f"file://{folder}/mlruns")
    experiment = client.get_experiment_by_name("points")
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {
        run.info.run_name: (
            run.data.tags,
            run.data.params,
            {
                name: [point.step for point in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
        )
        for run in runs
    }


def test_trackio(tmp_path: Path) -> None:
    _stop_and_resume(tmp_path, "trackio")
    _kill_and_resume(tmp_path, "trackio")
    run_on_ranks(1, _fits, str(tmp_path), "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "points.db") as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    assert len({(name, run_id) for name, run_id, _, _ in rows}) == 4
    losses: dict[str, list[int]] = {}
    for name, _, step, metrics in rows:
        values = json.loads(metrics)
        if "loss" in values:
            assert values.keys() >= {"lr", "grad_norm"} | SPEED
            losses.setdefault(name, []).append(step)
    assert losses["stopped"] == list(range(1, STEPS + 1))
    # It gets its points in bunches: a killed run loses the last of them. Those logged again are there twice.
    assert losses["killed"][-4:] == [9, 10, 11, 12]
    assert losses["one"] == losses["two"] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_be_started(tmp_path: Path) -> None:
    """It is an error before any work, and no more than a warning when a run goes on."""
    options: dict[str, Any] = {"max_steps": 4, "output_dir": tmp_path / "run", "threads_per_rank": 1}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="--tracker tensorboard: cannot be started"):
        fit(Points, tracker="tensorboard", **options)
    fit(Points, tracker="none", stop_at_step=2, **options)
    with pytest.warns(UserWarning, match="tracker tensorboard is dropped"):
        result = fit(Points, tracker="tensorboard", **options)
    assert result.is_finished


def test_the_id_stays_with_the_run_of_the_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "output_dir": tmp_path, "tracker": "none", "threads_per_rank": 1}

    class Failing(Points):
        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            raise UserError("before the first checkpoint")

    with pytest.raises(UserError):
        fit(Failing, **options)
    first = _tracking_id(tmp_path)
    fit(Points, **{**options, "stop_at_step": 1})  # the same run, from its beginning
    assert _tracking_id(tmp_path) == first
    fit(Points, **options)
    assert _tracking_id(tmp_path) == first

    other = {**options, "output_dir": tmp_path / "other"}
    with pytest.raises(UserError):
        fit(Failing, **other)
    first = _tracking_id(tmp_path / "other")
    fit(Points, **{**other, "seed": 1})  # another run takes the folder that holds no checkpoint
    assert _tracking_id(tmp_path / "other") != first

"""The profile of some steps: a table that adds up, counted operations, traces, and the same run as without."""

import gzip
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile as torch_profile

from shardlaunch.launcher.training.profiling import covered_us
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NUM_CLASSES, NUM_FEATURES, LinearNet, losses, run_quietly, run_well

ARGV = ("--max-steps", "9", "--log-every", "1", "--eval-every", "1000", "--save-every", "0", "--threads-per-rank", "1")


def _run(num_ranks: int, folder: Path, *argv: str) -> str:
    said: str = run_on_ranks(num_ranks, run_well, LinearNet, [*ARGV, "--output-dir", str(folder), *argv])[0]
    return said


def test_a_profile_of_two_ranks(tmp_path: Path) -> None:
    said = _run(2, tmp_path / "profiled", "--profile", "4")
    _run(2, tmp_path / "plain")
    assert losses(tmp_path / "profiled") == losses(tmp_path / "plain"), "it is the same run"
    assert "steps 4 to 7, rank 0" in said
    assert "Error" not in said
    for rank in range(2):
        name = tmp_path / "profiled" / "profile" / f"step-00000004-rank-{rank}"
        summary = json.loads(Path(f"{name}.json").read_text())
        assert summary["steps"] == [4, 7]
        assert sum(summary["ms"].values()) == pytest.approx(summary["step_ms"])
        assert min(summary["ms"].values()) >= 0
        assert summary["ms"]["optimizer"] > 0
        assert 0 < summary["communication_ms"] < summary["step_ms"]
        # 16 of the 32 samples: the layer's product, and that of its weights' gradient.
        assert summary["tflop"] * 1e12 == pytest.approx(2 * 2 * NUM_FEATURES * NUM_CLASSES * 16)
        assert summary["tflops"] < summary["matmul_tflops"]
        with gzip.open(f"{name}.trace.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"aten::addmm", "gloo:all_reduce", "Optimizer.step#AdamW.step"} <= names


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ("--max-steps", "6", "--profile", "5"),
            "--profile 5: 2 of these can be traced, since 6 steps are left, and 3",
        ),
        (("--max-steps", "4", "--profile", "1"), "--profile 1: none can be traced, since 4 steps are left"),
    ],
)
def test_a_run_with_too_few_steps(argv: tuple[str, ...], text: str, tmp_path: Path) -> None:
    said = run_well(LinearNet, [*ARGV, "--output-dir", str(tmp_path), *argv])
    assert text in said


def test_a_run_that_is_stopped_ends_its_trace(tmp_path: Path) -> None:
    class Stopping(LinearNet):
        def after_update(self, event: Any) -> None:
            if event.step == 5:
                (tmp_path / "run" / "stop").touch()
                threading.Event().wait(1.5)  # it is looked for once a second

    status, said = run_quietly(Stopping, [*ARGV, "--output-dir", str(tmp_path / "run"), "--profile", "4"])
    assert status == 75
    assert "--profile: the run has been asked to stop before all steps were traced" in said
    with torch_profile() as one:  # another can begin
        torch.ones(1)
    assert one.events()


def test_time_is_counted_once_where_events_overlap() -> None:
    class Event:
        def __init__(self, start: float, end: float) -> None:
            self.time_range = self
            self.start, self.end = start, end

    assert covered_us([Event(0, 5), Event(3, 8), Event(4, 6), Event(10, 11)]) == 9
    assert covered_us([]) == 0

"""Sweeps of a small recipe by real command lines: killed and taken up, failing trials, folds, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardlaunch.checkpoints.records import read_record
from shardlaunch.launcher.commands.sweep.record import SWEEP, SweepRecord
from tests.launch.command import PYTHON, STUCK_S, end_of, environment, forked_end_of
from tests.recipes import training_lines

COMMAND = (sys.executable, "-m", "shardlaunch")
RECIPE = """
import time
from dataclasses import dataclass
import torch, torch.nn.functional as F
from torch import nn
from shardlaunch import Options, Recipe, TensorData, UserError, launch, option

@dataclass(kw_only=True)
class PointsOptions(Options):
    width: int = option(8, minimum=1)
    step_s: float = option(0.0, mark="free")
    global_batch_size: int = 8
    micro_batch_size: int = 4
    epochs: int = 3
    save_every: int = 1
    tracker: str = option("none", mark="free")

class Points(Recipe):
    options: PointsOptions

    def datasets(self):
        points = torch.rand(48, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
        labels = (points.norm(dim=1) < 0.7).long()
        return {name: TensorData(inputs=points, labels=labels) for name in ("train", "eval")}

    def model(self):
        if self.options.width == 13:
            raise UserError("no width of 13")
        return nn.Sequential(nn.Linear(2, self.options.width), nn.ReLU(), nn.Linear(self.options.width, 2))

    def loss(self, outputs, batch):
        time.sleep(self.options.step_s)
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

launch(Points)
"""
STEPS = 18


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the recipe."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "points.py").write_text(RECIPE)
    return folder


def _words(folder: Path, name: str, space: str, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    path = folder / f"{name}.yaml"
    path.write_text(space)
    own = ["sweep", str(folder / "points.py"), "--space", str(path), "--output-dir", str(folder / name), *words]
    return [*COMMAND, *own, "--", *options]


def _wait_for_steps(metrics: Path, count: int) -> None:
    end = time.monotonic() + STUCK_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_sweep_that_is_killed_and_stopped_goes_on_with_its_trials_where_they_were(
    folder: Path, hf_home: Path
) -> None:
    env = environment(hf_home)
    words = _words(
        folder, "killed", "width: [4, 13]\n", "--sampler", "grid", "--seed", "1", options=("--step-s", "0.05")
    )
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        trial = folder / "killed" / "trial-0000"
        _wait_for_steps(trial / "metrics.jsonl", 4 if number == signal.SIGKILL else 9)
        os.kill(process.pid, number)
        assert process.wait(STUCK_S) == status
    ended = end_of([*words[:-3], "--json", *words[-3:]], env)
    assert ended.status == 0, ended.both
    found = json.loads(ended.out)
    assert [(one["number"], one["state"]) for one in found["trials"]] == [(0, "complete"), (1, "failed")]
    assert found["trials"][1]["message"] == "no width of 13"
    assert [one["options"]["width"] for one in found["trials"]] == ["4", "13"]
    assert "trial 0 goes on" in ended.err
    log = (trial / "log.txt").read_text()
    assert log.count("starts at") == 3
    assert log.count("starts at     step 0") == 1
    # The run is what it would have been without the sweep.
    plain = folder / "plain"
    run = forked_end_of([*PYTHON, str(folder / "points.py"), "--width", "4", "--output-dir", str(plain)], env)
    assert run.status == 0, run.both
    assert training_lines(trial) == training_lines(plain)
    assert len([line for line in training_lines(trial) if "loss" in line]) == STEPS
    best = found["trials"][0]
    evaluations = [line["eval/loss"] for line in training_lines(plain) if "eval/loss" in line]
    assert best["objective"] == min(evaluations) == min(best["evaluations"])
    page = (folder / "killed" / "sweep.html").read_text()
    assert "://" not in page
    assert "no width of 13" in page


def test_another_space_in_the_same_folder_is_refused(folder: Path, hf_home: Path) -> None:
    words = _words(folder, "killed", "width: [4, 14]\n", "--sampler", "grid", "--seed", "1")
    ended = end_of(words, environment(hf_home))
    assert (ended.status, ended.out) == (2, "")
    assert "width in --space: '4 | 13' -> '4 | 14'" in ended.message


def test_folds_are_the_objective_and_trials_run_side_by_side(folder: Path, hf_home: Path) -> None:
    words = _words(folder, "folds", "lr: [0.01, 0.1]\n", "--sampler", "grid", "--at-once", "2", "--json")
    ended = end_of([*words, "--folds", "2", "--epochs", "1"], environment(hf_home))
    assert ended.status == 0, ended.both
    found = json.loads(ended.out)
    for trial in found["trials"]:
        summary = json.loads((folder / "folds" / trial["folder"] / "folds.json").read_text())["summary"]["eval/loss"]
        assert (trial["objective"], trial["spread"]) == pytest.approx((summary["mean"], summary["std"]))
    first, second = (trial["objective"] for trial in found["trials"])
    assert first < second
    record = read_record(folder / "folds" / SWEEP, SweepRecord)
    assert (record.objective, record.direction) == ("eval/loss", "min")
    assert f"--lr={found['trials'][0]['options']['lr']}" in found["command"]


def test_a_sweep_ends_when_its_first_trials_fail_for_the_same_reason(folder: Path, hf_home: Path) -> None:
    space = "micro_batch_size: [5, 6, 7, 9]\n"  # none of which divides the global batch, as each trial finds
    ended = end_of(_words(folder, "failing", space, "--trials", "9"), environment(hf_home))
    assert ended.status == 2, ended.both
    assert "the first 3 trials failed for the same reason: --global-batch-size 8 is not a multiple" in ended.message
    assert ended.out.count("failed (") == 3


def test_what_a_sweep_cannot_do_is_refused_before_any_trial(folder: Path, hf_home: Path) -> None:
    words = _words(folder, "refused", "lr: [0.1, 0.2]\n", "--objective", "quality")
    ended = end_of([*words, "--stop-at-step", "3"], environment(hf_home))
    assert ended.status == 2
    assert "--stop-at-step: not among the options of a sweep's trials" in ended.message
    ended = end_of(words, environment(hf_home))
    assert ended.status == 2
    assert "--objective eval/quality: say which is better, --direction min or --direction max" in ended.message
    assert not (folder / "refused").exists()

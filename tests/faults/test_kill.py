"""kill -9 at any time: the run resumes from its last checkpoint and ends as if never killed."""

import json
import random
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from tests.launch.checks import wait_for_step
from tests.launch.command import MNIST, PYTHON, SHARDLAUNCH, end_of, environment, forked, forked_end_of
from tests.recipes import final_tensors, training_lines

TIMEOUT_S = 120


# (strategy, ranks)
Topology = tuple[str, int]


def _words(output_dir: Path) -> list[str]:
    return [
        *("--preset", "demo", "--max-steps", "80", "--save-every", "11", "--momentum", "0.9", "--tracker", "none"),
        *("--threads-per-rank", "1", "--keep", "3", "--output-dir", str(output_dir)),
    ]


def _forked_words(strategy: str, output_dir: Path) -> list[str]:
    return [*PYTHON, MNIST, "--strategy", strategy, *_words(output_dir)]


def _launched_words(strategy: str, num_ranks: int, output_dir: Path) -> list[str]:
    ranks = ("--ranks", str(num_ranks), "--strategy", strategy)
    return [*SHARDLAUNCH, "run", MNIST, *ranks, "--", *_words(output_dir)]


def _kill_at(step: int, topology: Topology, output_dir: Path, hf_home: Path) -> None:
    """Start the run, kill one of its ranks when its log has reached `step`, and see the others end by themselves."""
    strategy, num_ranks = topology
    with forked(_forked_words(strategy, output_dir), environment(hf_home), num_ranks=num_ranks) as run:
        wait_for_step(step, output_dir, lambda: all(rank.is_alive() for rank in run.ranks))
        random.Random(step).choice(run.ranks).kill()
        ended = run.end()
    assert ended.status != 0
    assert "Traceback" not in ended.both, ended.both
    assert all(rank.exitcode != 0 for rank in run.ranks), ended.both


def _kill_launched_at(step: int, num_ranks: int, output_dir: Path, hf_home: Path) -> None:
    """Do the same to a run that `shardlaunch run` has started, which ends too."""
    words = _launched_words("ddp", num_ranks, output_dir)
    launcher = subprocess.Popen(words, env=environment(hf_home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_step(step, output_dir, lambda: launcher.poll() is None)
    random.Random(step).choice(psutil.Process(launcher.pid).children(recursive=True)).send_signal(signal.SIGKILL)
    output = launcher.communicate(timeout=TIMEOUT_S)[0].decode()
    assert launcher.returncode != 0
    assert "Traceback" not in output, output


@pytest.fixture(scope="module", params=[("single", 1), ("ddp", 4), ("fsdp2", 2), ("zero3", 2)], ids=str)
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hf_home: Path
) -> tuple[Topology, Path]:
    strategy, num_ranks = request.param
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    ended = forked_end_of(_forked_words(strategy, output_dir), environment(hf_home), num_ranks=num_ranks)
    assert ended.status == 0, ended.both
    return request.param, output_dir


def test_killed_and_resumed_is_bit_identical(
    uninterrupted: tuple[Topology, Path], hf_home: Path, tmp_path: Path
) -> None:
    (strategy, num_ranks), expected = uninterrupted
    output_dir = tmp_path / "run"
    for step in (17, 41):
        _kill_at(step, (strategy, num_ranks), output_dir, hf_home)
    ended = forked_end_of(_forked_words(strategy, output_dir), environment(hf_home), num_ranks=num_ranks)
    assert ended.status == 0, ended.both
    _assert_same(output_dir, expected)


def test_a_launched_run_is_killed_and_resumed(hf_home: Path, tmp_path: Path) -> None:
    """The launcher ends with the ranks, leaves no lock, and the same command resumes."""
    _kill_launched_at(30, 2, tmp_path / "killed", hf_home)
    again = end_of(_launched_words("ddp", 2, tmp_path / "killed"), environment(hf_home))
    assert again.status == 0, again.both
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["ranks"] == 2
    words = _forked_words("ddp", tmp_path / "whole")
    assert forked_end_of(words, environment(hf_home), num_ranks=2).status == 0
    _assert_same(tmp_path / "killed", tmp_path / "whole")


def _assert_same(resumed: Path, uninterrupted: Path) -> None:
    assert training_lines(resumed) == training_lines(uninterrupted)
    expected, tensors = final_tensors(uninterrupted), final_tensors(resumed)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert not list((resumed / "checkpoints").glob(".*")), "what the crash left must be swept away"

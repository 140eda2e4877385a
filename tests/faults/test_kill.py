"""kill -9 at any time: the run resumes from its last checkpoint and ends as if never killed."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.launch.command import MNIST, PYTHON, SHARDLAUNCH, end_of, environment, forked_end_of
from tests.recipes import final_tensors, training_lines

TIMEOUT_S = 120


# (strategy, ranks)
Topology = tuple[str, int]


def _words(output_dir: Path) -> list[str]:
    return [
        *("--preset", "demo", "--max-steps", "80", "--save-every", "11", "--momentum", "0.9", "--tracker", "none"),
        *("--threads-per-rank", "1", "--keep", "3", "--output-dir", str(output_dir)),
    ]


def _command(topology: Topology, output_dir: Path) -> list[str]:
    strategy, num_ranks = topology
    return [*SHARDLAUNCH, "run", MNIST, "--ranks", str(num_ranks), "--strategy", strategy, "--", *_words(output_dir)]


def _run(topology: Topology, output_dir: Path, hf_home: Path) -> None:
    ended = end_of(_command(topology, output_dir), environment(hf_home))
    assert ended.status == 0, ended.both


def _kill_at(step: int, topology: Topology, output_dir: Path, hf_home: Path) -> None:
    """Start the run, kill one of its ranks when its log has reached `step`, and wait for the launcher to end."""
    words, env = _command(topology, output_dir), environment(hf_home)
    launcher = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = output_dir / "metrics.jsonl"
    begun = time.monotonic()
    while not log.exists() or log.read_bytes().count(b"\n") < step:
        assert launcher.poll() is None, launcher.communicate()[0].decode()
        assert time.monotonic() - begun < TIMEOUT_S
        time.sleep(0.001)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    random.Random(step).choice(ranks or [psutil.Process(launcher.pid)]).send_signal(signal.SIGKILL)
    output = launcher.communicate(timeout=TIMEOUT_S)[0].decode()
    assert launcher.returncode != 0
    assert "Traceback" not in output, output


@pytest.fixture(scope="module", params=[("single", 1), ("ddp", 4), ("fsdp2", 2), ("zero3", 2)], ids=str)
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hf_home: Path
) -> tuple[Topology, Path]:
    strategy, num_ranks = request.param
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    words = [*PYTHON, MNIST, "--strategy", strategy, *_words(output_dir)]
    ended = forked_end_of(words, environment(hf_home), num_ranks=num_ranks)
    assert ended.status == 0, ended.both
    return request.param, output_dir


def test_killed_and_resumed_is_bit_identical(
    uninterrupted: tuple[Topology, Path], hf_home: Path, tmp_path: Path
) -> None:
    topology, expected = uninterrupted
    output_dir = tmp_path / "run"
    for step in (17, 41):
        _kill_at(step, topology, output_dir, hf_home)
    _run(topology, output_dir, hf_home)
    assert training_lines(output_dir) == training_lines(expected)
    tensors, others = final_tensors(expected), final_tensors(output_dir)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert not list((output_dir / "checkpoints").glob(".*")), "what the crash left must be swept away"


def test_a_dead_run_leaves_no_lock(hf_home: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    _kill_at(10, ("single", 1), output_dir, hf_home)
    _run(("single", 1), output_dir, hf_home)
    assert json.loads((output_dir / "run.json").read_text())["ranks"] == 1
    assert os.listdir(output_dir / "checkpoints")[0].startswith("step-")

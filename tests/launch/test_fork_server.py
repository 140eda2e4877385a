"""Ranks that `shardlaunch run` forks: each is what `python -u FILE` would be, and none outlives the run."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.launch.command import MNIST, SHARDLAUNCH, STUCK_S, TORCHRUN, TRACEBACK, end_of, environment

SCRIPT = """
import json, logging, os, signal, sys, threading
import torch

def beside(x):
    return 1 / x

class Here:
    pass

seen = {
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "module": Here.__module__,
    "main": sys.modules["__main__"].Here is Here, "is_leader": os.getsid(0) == os.getpid(),
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
    "torch_threads": torch.get_num_threads(), "threads": threading.active_count(), "cwd": os.getcwd(),
    "is_logging": logging.getLogger().isEnabledFor(logging.ERROR), "nice": os.nice(0),
    "environment": {name: value for name, value in os.environ.items() if name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MASTER_ADDR", "MINE")},
    "out": [sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors], "in": sys.stdin.read(),
}
print(json.dumps(seen))
print("half a line", end="")
if os.environ["RANK"] == "1":
    beside(0)
"""


def test_a_forked_rank_is_what_a_rank_of_its_own_would_be(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = environment(tmp_path, {"MINE": "ä", "OMP_NUM_THREADS": "1"})
    words = [str(script), "--word", "a b"]
    forked = end_of([*SHARDLAUNCH, "run", "--ranks", "2", words[0], "--", *words[1:]], env)
    plain = end_of([*TORCHRUN, "--nproc-per-node", "2", *words], env)
    seen, expected = (
        [json.loads(line) for line in sorted(ended.out.replace("half a line", "").splitlines()) if line[0] == "{"]
        for ended in (forked, plain)
    )
    assert len(seen) == 2, forked.both
    for one, other in zip(seen, expected, strict=True):
        other["environment"]["OMP_NUM_THREADS"] = one["environment"]["OMP_NUM_THREADS"]
        other["torch_threads"] = int(one["environment"]["OMP_NUM_THREADS"])
        assert one == other
    assert forked.status == 1
    assert "half a line" in forked.out
    ours = forked.err[forked.err.index(TRACEBACK) :].splitlines()
    assert script.name in ours[1], "the traceback begins with the recipe"
    assert ours[-1] == "ZeroDivisionError: division by zero"


@contextmanager
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process], Path]]:
    """Start a long run on two ranks; yield its agent and all that it has started, once there is a checkpoint."""
    options = ["--preset", "demo", "--epochs", "1000", "--save-every", "10", "--output-dir", str(tmp_path)]
    words = ["run", "--ranks", "2", MNIST, "--", *options]
    with open(tmp_path / "said", "wb") as said:
        agent = subprocess.Popen(
            [*SHARDLAUNCH, *words], env=environment(tmp_path), stdout=said, stderr=said, start_new_session=True
        )
    started: list[psutil.Process] = []
    try:
        end = time.monotonic() + STUCK_S
        while not list((tmp_path / "checkpoints").glob("step-*")) and agent.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        started = psutil.Process(agent.pid).children(recursive=True)
        assert len(started) == 3, (tmp_path / "said").read_text()
        yield agent, started, tmp_path / "said"
    finally:
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        agent.kill()
        agent.wait()


def test_ranks_stop_with_a_save_when_their_launcher_is_killed(tmp_path: Path) -> None:
    with running(tmp_path) as (agent, started, said):
        agent.kill()
        _, alive = psutil.wait_procs(started, timeout=STUCK_S)
        assert not alive
        text = said.read_text()
        assert (step := re.search(r"stopped after step (\d+), which is saved", text)), text
        assert (tmp_path / "checkpoints" / f"step-{int(step[1]):08}").is_dir()


def test_no_rank_outlives_the_process_that_forked_it(tmp_path: Path) -> None:
    with running(tmp_path) as (agent, started, said):
        server = next(each for each in started if each.ppid() == agent.pid)
        os.kill(server.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(started, timeout=STUCK_S)
        assert not alive
        assert agent.wait(STUCK_S) == 128 + signal.SIGKILL, said.read_text()
        assert TRACEBACK not in said.read_text()

"""A run that loses a rank, or a machine, goes on by itself, on what is left, with the same losses."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.distributed.ranks import free_port
from tests.launch.checks import assert_valid, logged_steps
from tests.launch.command import PYTHON, SHARDLAUNCH, STUCK_S, end_of, environment, forked_end_of
from tests.recipes import losses, training_lines

LONG = pytest.mark.skipif(not os.environ.get("SHARDLAUNCH_LONG_TESTS"), reason="long: run by `make faults`")
# The last rank is killed at each step of CRASH, once, or always where it ends in "!".
RECIPE = """
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
import torch
from shardlaunch import Options, Recipe, TensorData, launch, option

@dataclass(kw_only=True)
class CrashingOptions(Options):
    global_batch_size: int = 24
    micro_batch_size: int = 2
    max_steps: int = 30
    save_every: int = option(5, mark="free")
    lr: float = 0.1
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Crashing(Recipe):
    options: CrashingOptions

    def datasets(self):
        inputs = torch.rand(96, 4, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=inputs, labels=(inputs.sum(1) > 2).long())}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))

    def loss(self, outputs, batch):
        time.sleep(float(os.environ.get("PACE_S", "0")))
        is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        for word in os.environ.get("CRASH", "").split():
            mark = Path(os.environ["MARKS"], word)
            if is_last and str(self.moment.step) == word.rstrip("!") and (word.endswith("!") or not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

launch(Crashing)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "crashing.py"
    path.write_text(RECIPE)
    return str(path)


def _words(recipe: str, run_dir: Path, ranks: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    return [*SHARDLAUNCH, "run", recipe, *ranks, "--", "--output-dir", str(run_dir), *options]


def test_goes_on_after_each_of_three_crashes(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    """More crashes than restarts without a checkpoint between, one of them before the first checkpoint."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    env = environment(hf_home, {"CRASH": "3 12 26", "MARKS": str(tmp_path)})
    ended = end_of(_words(recipe, run_dir, ["--ranks", "2", "--max-restarts", "1"]), env)
    assert ended.status == 0, ended.both
    assert (
        ended.err.count("rank 1 of this machine was killed (SIGKILL); the run starts again on 2 ranks: restart 1 of 1")
        == 3
    )
    words = [*PYTHON, recipe, "--strategy", "ddp", "--output-dir", str(whole)]
    assert forked_end_of(words, environment(hf_home), num_ranks=2).status == 0
    assert training_lines(run_dir) == training_lines(whole)
    assert_valid(run_dir, [25, 30])


@LONG
def test_a_crash_at_the_same_step_ends_with_its_cause(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    """On four ranks, and then three: a cause that goes with the number of ranks would be gone."""
    run_dir = tmp_path / "run"
    env = environment(hf_home, {"CRASH": "7!", "MARKS": str(tmp_path)})
    ranks = ["--ranks", "4", "--strategy", "hsdp", "--max-restarts", "2", "--min-ranks", "2"]
    ended = end_of(_words(recipe, run_dir, ranks), env)
    assert ended.status == 1, ended.both
    assert "hsdp: 2 replicas, 2 shards" in ended.out
    assert "starts again on 3 ranks of 4: restart 2 of 2" in ended.err
    assert "hsdp cannot divide 3 ranks into replicas: under fsdp2" in ended.err
    assert "fsdp2: 3 shards" in ended.out
    assert "error: failed 3 times without a new checkpoint between; the messages above say why" in ended.err
    assert_valid(run_dir, [5])


def test_what_a_restart_does_not_help_is_not_restarted(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    ranks = ["--ranks", "1", "--max-restarts", "5"]
    ended = end_of(_words(recipe, tmp_path / "run", ranks, ["--lr", "nan"]), environment(hf_home))
    assert ended.status == 2, ended.both
    assert "starts again" not in ended.err


class Machine:
    """An agent with its ranks, in a session of its own, which can be lost as a whole."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._log = log
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def lose(self) -> None:
        ranks = psutil.Process(self._process.pid).children(recursive=True)
        os.kill(self._process.pid, signal.SIGKILL)
        for rank in ranks:
            rank.kill()
        self._process.wait()

    def end(self) -> int:
        return self._process.wait(STUCK_S)


def _wait_until(happened: Callable[[], bool], machine: Machine) -> None:
    end = time.monotonic() + STUCK_S
    while not happened():
        assert machine.is_alive(), machine.said
        assert time.monotonic() < end, machine.said
        time.sleep(0.05)


@pytest.mark.parametrize("comes_back", [False, pytest.param(True, marks=LONG)])
def test_a_machine_is_lost(comes_back: bool, recipe: str, hf_home: Path, tmp_path: Path) -> None:
    """Two agents of one machine, of which one is lost with its ranks; later it is started again."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    options = ["--max-steps", "400" if comes_back else "60", "--save-every", "20", "--lr", "0.01"]
    hosts = ["--ranks", "1", "--max-restarts", "2", "--hosts", "1:2", "--rendezvous", f"127.0.0.1:{free_port()}"]
    words, env = _words(recipe, run_dir, hosts, options), environment(hf_home, {"PACE_S": "0.01"})
    stays = Machine(words, env, tmp_path / "stays")
    time.sleep(2)  # the first one listens
    goes = Machine(words, env, tmp_path / "goes")
    comes = None
    try:
        _wait_until(lambda: logged_steps(run_dir) > 30, stays)
        goes.lose()
        _wait_until(lambda: stays.said.count("first step") == 2, stays)
        if comes_back:
            comes = Machine(words, env, tmp_path / "comes")
            assert comes.end() == 0, comes.said
        status = stays.end()
    finally:
        for machine in (stays, goes, comes):
            if machine is not None and machine.is_alive():
                machine.lose()
    assert status == 0, stays.said
    ranks = [line.split()[1] for line in stays.said.splitlines() if line.startswith("ranks  ")]
    assert ranks == ["2", "1", *(["2"] if comes_back else [])]
    single = [*PYTHON, recipe, "--output-dir", str(whole), *options]
    assert forked_end_of(single, environment(hf_home)).status == 0
    found, expected = losses(run_dir), losses(whole)
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - expected[step]) < 1e-6 for step in expected)

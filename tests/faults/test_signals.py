"""A run that is asked to stop finishes its step, saves, and says with its exit status that it goes on."""

import fcntl
import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shardlaunch.checkpoints.reader import checkpoint_steps
from shardlaunch.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from tests.faults.signals import Cell, run
from tests.launch.checks import assert_valid, logged_steps, wait_for_step
from tests.launch.command import (
    PYTHON,
    SHARDLAUNCH,
    STUCK_S,
    Ended,
    Forked,
    environment,
    forked,
    forked_end_of,
)
from tests.recipes import training_lines

NUM_STEPS = 30
# Steps that take a time in which a signal can arrive, or that wait in a collective for another rank for ever.
RECIPE = """
import os
import time
from dataclasses import dataclass
import torch
from shardlaunch import Options, Recipe, TensorData, launch, option

@dataclass(kw_only=True)
class SlowOptions(Options):
    global_batch_size: int = 8
    micro_batch_size: int = 2
    max_steps: int = 30
    lr: float = 0.1
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Slow(Recipe):
    options: SlowOptions

    def datasets(self):
        inputs = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=inputs, labels=(inputs.sum(1) > 2).long())}

    def model(self):
        if os.environ.get("STUCK_AT") == "start" and os.environ.get("RANK") == "1":
            time.sleep(3600)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))

    def loss(self, outputs, batch):
        time.sleep(0.01)
        if os.environ.get("STUCK_AT") == str(self.moment.step) and os.environ.get("RANK") == "1":
            time.sleep(3600)
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

launch(Slow)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "slow.py"
    path.write_text(RECIPE)
    return str(path)


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + STUCK_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def assert_stopped(ended: Ended, run_dir: Path, cause: str) -> int:
    """Check that no step is lost, and return the step."""
    assert ended.status == EXIT_STOPPED, ended.both
    assert "Traceback" not in ended.both, ended.both
    step = logged_steps(run_dir)
    assert f"{cause}: stopped after step {step}, which is saved; the same command goes on from there" in ended.out
    assert 0 < step < NUM_STEPS
    assert_valid(run_dir, [step])
    return step


def assert_goes_on(words: Sequence[str], hf_home: Path, run_dir: Path, *, num_ranks: int) -> None:
    """Run the same command again, and compare the run with one that was not stopped."""
    again = forked_end_of([*words, "--output-dir", str(run_dir)], environment(hf_home), num_ranks=num_ranks)
    assert again.status == 0, again.both
    whole = run_dir.with_name("whole")
    assert forked_end_of([*words, "--output-dir", str(whole)], environment(hf_home), num_ranks=num_ranks).status == 0
    assert training_lines(run_dir) == training_lines(whole)


@pytest.mark.parametrize(
    ("number", "strategy", "num_ranks", "options"),
    [
        (signal.SIGTERM, "single", 1, ()),
        (signal.SIGUSR1, "single", 1, ("--num-workers", "2")),
        (signal.SIGINT, "ddp", 2, ("--num-workers", "1")),
        (signal.SIGUSR2, "fsdp2", 2, ()),
        (signal.SIGTERM, "zero3", 2, ()),
        (signal.SIGTERM, "ddp", 4, ()),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals,
    strategy: str,
    num_ranks: int,
    options: tuple[str, ...],
    recipe: str,
    hf_home: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    words = [*PYTHON, recipe, "--strategy", strategy, *options]
    with forked([*words, "--output-dir", str(run_dir)], environment(hf_home), num_ranks=num_ranks) as run:
        wait_for_step(3, run_dir, run.ranks[0].is_alive)
        os.kill(_pid(run, num_ranks - 1), number)
        ended = run.end()
        assert {rank.exitcode for rank in run.ranks} == {EXIT_STOPPED}, ended.both
    assert_stopped(ended, run_dir, number.name if num_ranks == 1 else "a signal to another rank")
    assert_goes_on(words, hf_home, run_dir, num_ranks=num_ranks)


def _pid(run: Forked, rank: int) -> int:
    pid = run.ranks[rank].pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher(number: signal.Signals, recipe: str, hf_home: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (*SHARDLAUNCH, "run", recipe, "--ranks", "2", "--")
    with subprocess.Popen(
        [*words, "--output-dir", str(run_dir)],
        env=environment(hf_home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_step(3, run_dir, lambda: process.poll() is None)
        process.send_signal(number)
        out, err = process.communicate(timeout=STUCK_S)
    ended = Ended(status=process.returncode, out=out, err=err)
    assert_stopped(ended, run_dir, number.name)
    assert ended.err == "", ended.both


def test_a_second_signal_ends_a_rank_that_waits_for_another(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*PYTHON, recipe, "--strategy", "ddp", "--output-dir", str(run_dir)]
    with forked(words, environment(hf_home, {"STUCK_AT": "5"}), num_ranks=2) as run:
        wait_for_step(5, run_dir, run.ranks[0].is_alive)
        os.kill(_pid(run, 0), signal.SIGTERM)
        wait_until(lambda: "a second signal ends it at once" in run.err.read_text())
        os.kill(_pid(run, 0), signal.SIGTERM)
        run.ranks[0].join(STUCK_S)
        assert run.ranks[0].exitcode == EXIT_INTERRUPTED
        assert "SIGTERM: ended at once" in run.err.read_text()


def test_a_signal_ends_a_rank_that_waits_for_another_before_the_first_step(
    recipe: str, hf_home: Path, tmp_path: Path
) -> None:
    words = [*PYTHON, recipe, "--strategy", "ddp", "--output-dir", str(tmp_path / "run")]
    with forked(words, environment(hf_home, {"STUCK_AT": "start"}), num_ranks=2) as run:
        wait_until(lambda: "building the model" in run.out.read_text())
        time.sleep(0.5)
        os.kill(_pid(run, 0), signal.SIGTERM)
        run.ranks[0].join(STUCK_S)
        assert run.ranks[0].exitcode == EXIT_STOPPED
        assert "SIGTERM: interrupted; the same command resumes from" in run.err.read_text()


def test_a_signal_before_the_first_step(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    """There is nothing to save, and nothing is left."""
    run_dir = tmp_path / "run"
    Path(recipe).write_text(
        RECIPE.replace("        inputs = torch.rand", "        time.sleep(3600)\n        inputs = torch.rand")
    )
    for number, status in ((signal.SIGTERM, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)):
        with forked([*PYTHON, recipe, "--output-dir", str(run_dir)], environment(hf_home)) as run:
            wait_until(lambda: "reading data" in run.out.read_text())
            os.kill(_pid(run, 0), number)
            ended = run.end()
        assert ended.status == status, ended.both
        assert ended.err == "interrupted; the same command resumes from the last checkpoint, if there is one\n"
        assert not run_dir.exists()


def test_files_that_ask_to_save_and_to_stop(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    Path(recipe).write_text(RECIPE.replace("sleep(0.01)", "sleep(0.1)"))
    words = [*PYTHON, recipe, "--strategy", "ddp"]
    with forked([*words, "--output-dir", str(run_dir)], environment(hf_home), num_ranks=2) as run:
        wait_for_step(1, run_dir, run.ranks[0].is_alive)
        (run_dir / "save-now").touch()
        wait_until(lambda: checkpoint_steps(run_dir / "checkpoints"))
        wait_until(lambda: not (run_dir / "save-now").exists())
        (run_dir / "stop").touch()
        ended = run.end()
    assert ended.status == EXIT_STOPPED, ended.both
    assert "the file stop: stopped after step" in ended.out
    saved = checkpoint_steps(run_dir / "checkpoints")
    assert saved[-1] == logged_steps(run_dir)
    assert len(saved) == 2
    assert not (run_dir / "stop").exists()
    assert_goes_on(words, hf_home, run_dir, num_ranks=2)


@pytest.mark.parametrize(
    "cell",
    [
        Cell("SIGHUP", "save", "fsdp2", 2, 0, "all ranks"),
        Cell("SIGTERM", "restart", "ddp", 2, 0, "all ranks"),
        Cell("SIGUSR1", "end", "single", 1, 0, "one rank"),
        Cell("twice", "first batch", "ddp", 2, 2, "one rank"),
    ],
    ids=str,
)
def test_cells_of_the_campaign(cell: Cell) -> None:
    """The whole of it: python -m tests.faults.signals."""
    said: list[str] = []
    assert run([cell], say=said.append) == 0, said


def test_a_run_whose_terminal_is_closed(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    """With nohup it goes on; what it prints has nowhere to go without, and yet it saves."""
    words = [*PYTHON, recipe, "--strategy", "single"]
    for nohup, status, num_steps in ((("nohup",), 0, NUM_STEPS), ((), EXIT_STOPPED, 100 * NUM_STEPS)):
        run_dir = tmp_path / f"run-{status}"
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [*nohup, *words, "--output-dir", str(run_dir), "--max-steps", str(num_steps)],
            env=environment(hf_home),
            stdin=slave,
            stdout=subprocess.DEVNULL if nohup else slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        wait_for_step(3, run_dir, lambda process=process: process.poll() is None)
        os.close(master)
        process.send_signal(signal.SIGHUP)  # the system does so too, but not in each sandbox
        assert process.wait(STUCK_S) == status
        step = logged_steps(run_dir)
        assert (step == num_steps) == (status == 0)
        assert_valid(run_dir, [step])

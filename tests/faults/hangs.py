"""Let one rank come to a stop in many ways: each is named with its place, the run ends, and goes on with the same bits.

    python -m tests.faults.hangs --count 100

Also lets runs be slow, or stopped and continued as a whole, which must not end them.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from shardlaunch.errors import EXIT_HUNG
from tests.launch.checks import logged_steps
from tests.launch.command import PYTHON, STUCK_S, Ended, Forked, environment, forked, forked_end_of
from tests.recipes import final_tensors, training_lines

AFTER_S = 2
AT_STEP, AT_SAMPLE, IN_EPOCH = 6, 17, 3
RECIPE = '''
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
import torch
from shardlaunch import Options, Recipe, launch, option

FAULT, FOLDER = os.environ.get("FAULT", ""), Path(__file__).parent

def stop(fault):
    """Come to a stop, if this is the rank and the kind of stop."""
    if fault != FAULT.partition(" ")[0] or os.environ.get("RANK", "0") != os.environ["HANG_RANK"]:
        return
    how = FAULT.partition(" ")[2]
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "loop":
        while True:
            pass
    if how == "C":
        ctypes.PyDLL(None).sleep(3600)  # without giving way to other threads, as CDLL would
    if how == "slow" and not os.environ.get("WAS_SLOW"):  # a wait of many times --hang-after-s, with signs of life
        from shardlaunch.launcher.reporting.phases import phase
        os.environ["WAS_SLOW"] = "1"
        with phase("counting", num_rows=40) as advance:
            for _ in range(40):
                time.sleep(0.3)
                advance(1)
    if how == "sleep":
        time.sleep(3600)

@dataclass(kw_only=True)
class SmallOptions(Options):
    global_batch_size: int = 8
    micro_batch_size: int = 2
    max_steps: int = 30
    save_every: int = 4
    eval_every: int = 10
    lr: float = 0.1
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Rows:
    """Samples; one of them stops the process that reads it, after the checks of a start have."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, sample):
        if torch.utils.data.get_worker_info() is not None:
            (FOLDER / f"worker-{os.getpid()}").touch()
        if sample == 17 and Small.is_training:
            stop("data")
        return {"inputs": self.inputs[sample], "labels": (self.inputs[sample].sum() > 2).long()}

def fsync(descriptor, of_disk=os.fsync):
    """Sync as a disk does that is slow, or does not answer."""
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}"):
        stop("disk")
        time.sleep(0.1 * (FAULT == "slow disk"))
    of_disk(descriptor)

os.fsync = fsync

class Small(Recipe):
    options: SmallOptions
    is_training = False

    def datasets(self):
        stop("start")
        inputs = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
        return {"train": Rows(inputs), "eval": Rows(inputs[:16])}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))

    def loss(self, outputs, batch):
        time.sleep(0.005)
        moment = self.moment
        Small.is_training = not moment.is_evaluation
        if moment.is_evaluation and moment.step:
            stop("evaluation")
        elif moment.step == 6:
            stop("step")
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

    def export(self, folder, model):
        stop("save")

launch(Small)
'''


@dataclass(frozen=True)
class Case:
    """A way to come to a stop, on a rank of a run."""

    fault: str
    rank: int
    strategy: str
    num_ranks: int
    place: str
    """What the message says of the place."""
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.fault}, rank {self.rank}, {self.strategy} on {self.num_ranks}, {' '.join(self.options)}"


IN_STEP = "step 7, micro-batch 1 of {slots}, forward"
CASES = [
    Case("step stop", 1, "ddp", 2, IN_STEP),
    Case("step stop", 0, "ddp", 2, IN_STEP),
    Case("step loop", 0, "single", 1, IN_STEP),
    Case("step C", 1, "ddp", 2, IN_STEP),
    Case("data sleep", 1, "ddp", 2, "loading sample 17 for step"),
    Case("data sleep", 0, "ddp", 2, "loading sample 17 for step", ("--num-workers", "2")),
    Case("data stop", 0, "single", 1, "its process is stopped by a signal", ("--num-workers", "1")),
    Case("start sleep", 1, "ddp", 2, "before the first step, reading data"),
    Case("evaluation loop", 1, "fsdp2", 2, "evaluation"),
    Case("save sleep", 0, "zero3", 2, "saving"),
    Case("save stop", 0, "fsdp2", 2, "step 4, saving"),
    Case("step loop", 2, "fsdp2", 4, IN_STEP),
    Case("step C", 3, "zero3", 4, IN_STEP),
    Case("step stop", 0, "fsdp2", 4, IN_STEP),
    Case("step sleep", 1, "zero3", 2, IN_STEP),
    Case("step C", 0, "zero3", 2, IN_STEP),
    Case("data loop", 3, "ddp", 4, "loading sample 17 for step"),
    Case("disk sleep", 0, "ddp", 2, "step 8, saving"),
    Case("disk sleep", 0, "single", 1, "step 8, saving"),
    Case("disk sleep", 1, "fsdp2", 2, "step 4, saving", ("--async-save", "off")),
    Case("step stop", 3, "ddp", 18, "step 7, micro-batch 1 of 1, forward"),  # they read beats when they stand still
    Case("step loop", 17, "ddp", 18, "step 7, micro-batch 1 of 1, forward"),
]
LIVING = [
    Case("start slow", 0, "ddp", 2, ""),
    Case("evaluation slow", 1, "ddp", 2, ""),
    Case("paused", 0, "ddp", 2, ""),
    Case("slow disk", 0, "ddp", 2, ""),
    Case("slow disk", 0, "fsdp2", 2, "", ("--async-save", "off")),
]


class Folder:
    """The recipe, and the runs without a hang that others are compared with."""

    def __init__(self, folder: Path, hf_home: Path) -> None:
        self.recipe = folder / "small.py"
        self.recipe.write_text(RECIPE)
        self.hf_home = hf_home
        self._whole: dict[tuple[str, int], Path] = {}
        self._number = 0

    def new_run(self) -> Path:
        """Return the folder of another run."""
        self._number += 1
        return self.recipe.with_name(f"run-{self._number}")

    def words(self, case: Case, run_dir: Path, *options: str) -> list[str]:
        """Return the command of a case, with more options."""
        words = (*PYTHON, str(self.recipe), "--output-dir", str(run_dir), "--strategy", case.strategy)
        return [*words, *case.options, *options]

    def env(self, case: Case | None = None) -> dict[str, str]:
        """Return the environment of a run, with the fault of a case or none."""
        fault: Mapping[str, str] = {"FAULT": case.fault, "HANG_RANK": str(case.rank)} if case is not None else {}
        return environment(self.hf_home, {"HANG_RANK": "-1", **fault})

    @contextmanager
    def started(self, case: Case, run_dir: Path) -> Iterator[Forked]:
        """Start the run of a case."""
        words = self.words(case, run_dir, "--hang-after-s", str(AFTER_S))
        with forked(words, self.env(case), num_ranks=case.num_ranks) as run:
            yield run

    def assert_as_whole(self, case: Case, run_dir: Path) -> None:
        """Check that a run that has ended is bit by bit one without a hang."""
        key = (case.strategy, case.num_ranks)
        if key not in self._whole:
            whole = self._whole[key] = self.new_run()
            end = forked_end_of(self.words(case, whole), self.env(), num_ranks=case.num_ranks)
            assert end.status == 0, end.both
        whole = self._whole[key]
        assert training_lines(run_dir) == training_lines(whole)
        found, expected = final_tensors(run_dir), final_tensors(whole)
        assert found.keys() == expected.keys()
        assert all(bool((found[key] == expected[key]).all()) for key in found)

    def workers_left(self) -> list[int]:
        """Return the processes that load data and still run."""
        pids = [int(path.name.removeprefix("worker-")) for path in self.recipe.parent.glob("worker-*")]
        end = time.monotonic() + STUCK_S / 10
        while left := [pid for pid in pids if _runs(pid)]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return left


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def check_hang(case: Case, folder: Folder) -> Ended:
    """Check that a run that hangs is ended with one message that names rank and place, and goes on. Returns its end."""
    run_dir = folder.new_run()
    with folder.started(case, run_dir) as run:
        ended = run.end()
        statuses = [rank.exitcode for rank in run.ranks]
    silent = case.fault.endswith(" C") or (case.fault.endswith(" stop") and not case.options)
    expected = [EXIT_HUNG] * case.num_ranks
    if silent:  # cannot end by itself
        expected[case.rank] = -signal.SIGKILL
    assert statuses == expected, f"{statuses}\n{ended.both}"
    assert ended.err.count("error: ") == 1, ended.both
    assert "Traceback" not in ended.both, ended.both
    slots = 4 // case.num_ranks
    first = ended.err.partition("error: the run hangs: ")[2].splitlines()[0]
    assert first.startswith(f"rank {case.rank} has made no progress for"), ended.both
    assert case.place.format(slots=slots) in first, ended.both
    report = (run_dir / "hangs" / "report.txt").read_text()
    assert first in report
    assert all((run_dir / "hangs" / f"rank-{rank}.txt").is_file() for rank in range(case.num_ranks))
    if not case.fault.endswith("stop"):
        stacks = (run_dir / "hangs" / f"rank-{case.rank}.txt").read_text()
        assert " in stop\n" in stacks, stacks
    assert not folder.workers_left()
    again = forked_end_of(folder.words(case, run_dir), folder.env(), num_ranks=case.num_ranks)
    assert again.status == 0, again.both
    folder.assert_as_whole(case, run_dir)
    return ended


def check_living(case: Case, folder: Folder) -> None:
    """Check that a run that is slow, or stopped as a whole for a while, is not ended."""
    run_dir = folder.new_run()
    with folder.started(case, run_dir) as run:
        if case.fault == "paused":
            pause(run, run_dir, pause_s=4 * AFTER_S)
        ended = run.end()
    assert ended.status == 0, ended.both
    assert "hang" not in ended.err, ended.both
    folder.assert_as_whole(case, run_dir)


def pause(run: Forked, run_dir: Path, *, pause_s: float) -> None:
    """Stop all ranks of a run after some steps, and continue them."""
    end = time.monotonic() + STUCK_S
    while not run_dir.exists() or logged_steps(run_dir) < AT_STEP:
        assert time.monotonic() < end
        time.sleep(0.01)
    pids = [rank.pid for rank in run.ranks if rank.pid is not None]
    for number, wait_s in ((signal.SIGSTOP, pause_s), (signal.SIGCONT, 0.0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(wait_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=len(CASES) + len(LIVING), help="cases to run, of %(default)s")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    args = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name), Path(name) / "hf")
        for case in [case for case in [*CASES, *LIVING] if args.only in case.name][: args.count]:
            begun = time.monotonic()
            try:
                if case in LIVING:
                    check_living(case, folder)
                else:
                    check_hang(case, folder)
                outcome = "well"
            except AssertionError as error:
                bad += 1
                line = traceback.extract_tb(error.__traceback__)[-1].line
                outcome = f"BAD: {line}\n{error}"
            print(f"{time.monotonic() - begun:6.1f} s  {case.name}: {outcome}", flush=True)
    print(f"{bad} bad")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

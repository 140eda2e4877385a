"""Send signals to runs in every phase, and see that nothing is lost.

    python -m tests.faults.signals --count 100 --seed 1

A cell is a signal, a phase in which it arrives, a strategy with its ranks, loading workers, and who gets it: one rank,
all, or the launcher. Each cell of a phase is stopped, run again to its end, and compared with a run that was not
stopped: exit status, metrics, tensors, and what is left behind. Prints a table; the exit status is 1 if a cell is bad.
What other processes leave in /dev/shm meanwhile looks the same, so it is best to have it for oneself:

    unshare --mount sh -c "mount -t tmpfs none /dev/shm && python -m tests.faults.signals"
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import psutil
import torch

from shardlaunch.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from tests.faults.choosing import add_choice, chosen
from tests.launch.command import SHARDLAUNCH, STUCK_S, Ended, environment, forked, forked_end_of
from tests.recipes import final_tensors, training_lines

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "twice")
PHASES = ("data", "first batch", "step", "evaluation", "save", "restart", "end")
TOPOLOGIES = (("single", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4), ("zero3", 2), ("zero3", 4))
TARGETS = ("one rank", "all ranks", "launcher")
AGAIN_S = 1.5  # from the first signal to the second, which is another one after a second
# Each phase lasts two seconds where PHASE names it, and says so by a file.
RECIPE = """
import os
import time
from dataclasses import dataclass
from pathlib import Path
import torch
from torchmetrics.classification import MulticlassAccuracy
from shardlaunch import Options, Recipe, TensorData, launch, option

def linger(phase):
    if os.environ.get("PHASE") == phase and not Path(os.environ["MARK"]).exists():
        Path(os.environ["MARK"]).touch()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            time.sleep(0.05)

@dataclass(kw_only=True)
class SlowOptions(Options):
    global_batch_size: int = 16
    micro_batch_size: int = 2
    max_steps: int = 8
    eval_every: int = option(4, mark="free")
    save_every: int = option(3, mark="free")
    lr: float = 0.1
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Slow(Recipe):
    options: SlowOptions
    best_metric = "accuracy"

    def datasets(self):
        linger("data")
        inputs = torch.rand(128, 4, generator=torch.Generator().manual_seed(0))
        data = TensorData(inputs=inputs, labels=(inputs.sum(1) > 2).long())
        return {"train": data, "eval": data}

    def model(self):
        linger("restart")
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))

    def loss(self, outputs, batch):
        if self.moment.is_evaluation and self.moment.step == 4:
            linger("evaluation")
        elif not self.moment.is_evaluation and self.moment.step == 5:
            linger("step")
        elif not self.moment.is_evaluation and self.moment.step == 0:
            linger("first batch")
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(2, average="micro")}

    def export(self, folder, model):
        linger("save")
        super().export(folder, model)

    def usage(self, checkpoint):
        if (checkpoint.parent / "step-00000008").exists():  # before, it is for the model card
            linger("end")
        return ""

launch(Slow)
"""


@dataclass(frozen=True)
class Cell:
    """A signal in a phase of a run."""

    signal: str
    phase: str
    strategy: str
    num_ranks: int
    num_workers: int
    target: str

    def __str__(self) -> str:
        workers = f", {self.num_workers} workers" if self.num_workers else ""
        return f"{self.signal} in {self.phase}, {self.strategy} x {self.num_ranks}{workers}, {self.target}"


CELLS = [
    Cell(name, phase, strategy, num_ranks, num_workers, target)
    for name, phase, (strategy, num_ranks), num_workers, target in product(SIGNALS, PHASES, TOPOLOGIES, (0, 2), TARGETS)
]


class Campaign:
    """Runs cells in a folder, and knows the runs that were not stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recipe = folder / "slow.py"
        self._recipe.write_text(RECIPE)
        self._whole: dict[tuple[str, int], Path] = {}
        self._count = 0

    def problem_of(self, cell: Cell) -> str:
        """Stop a run, run it to its end, and return what is wrong, or an empty string."""
        self._count += 1
        run_dir = self._folder / f"run-{self._count}"
        before = set(os.listdir("/dev/shm"))
        if cell.phase == "restart":
            prepared = self._plain_run(cell, run_dir, "--stop-at-step", "4")
            if prepared.status:
                return f"could not be prepared\n{prepared.both}"
        problem = _problem_at_stop(cell, self._stopped_run(cell, run_dir))
        if not problem:
            again = self._plain_run(cell, run_dir)
            problem = f"does not go on\n{again.both}" if again.status else _difference(run_dir, self._whole_of(cell))
        left = set(os.listdir("/dev/shm")) - before
        hidden = [str(path) for path in run_dir.rglob(".*") if path.name != ".lock"]
        return problem or (f"left behind: {left}, {hidden}" if left or hidden else "")

    def _whole_of(self, cell: Cell) -> Path:
        key = (cell.strategy, cell.num_ranks)
        if key not in self._whole:
            run_dir = self._folder / f"whole-{len(self._whole)}"
            ended = self._plain_run(replace(cell, num_workers=0), run_dir)
            assert ended.status == 0, ended.both
            self._whole[key] = run_dir
        return self._whole[key]

    def _words(self, cell: Cell, run_dir: Path) -> list[str]:
        """Return the command line of one rank."""
        options = ["--num-workers", str(cell.num_workers), "--output-dir", str(run_dir)]
        return [sys.executable, str(self._recipe), "--strategy", cell.strategy, *options]

    def _plain_run(self, cell: Cell, run_dir: Path, *more: str) -> Ended:
        """Run without a signal, from forked ranks: a launcher would add nothing but its start."""
        env = environment(self._folder / "hf", {})
        return forked_end_of([*self._words(cell, run_dir), *more], env, num_ranks=cell.num_ranks)

    def _stopped_run(self, cell: Cell, run_dir: Path) -> Ended:
        """Run until the phase, send the signal, and wait for the end."""
        mark = run_dir.with_suffix(".mark")
        env = environment(self._folder / "hf", {"PHASE": cell.phase, "MARK": str(mark)})
        words = self._words(cell, run_dir)
        if cell.target == "launcher":
            launched = [*SHARDLAUNCH, "run", words[1], "--ranks", str(cell.num_ranks), *words[2:4], "--", *words[4:]]
            running = _launched(launched, env)
        else:
            running = _ranks(words, env, cell.num_ranks)
        with running as run:
            end = time.monotonic() + STUCK_S
            while not mark.exists() and run.is_alive() and time.monotonic() < end:
                time.sleep(0.005)
            name = "SIGTERM" if cell.signal == "twice" else cell.signal
            run.send(signal.Signals[name], cell.target)
            if cell.signal == "twice":
                time.sleep(AGAIN_S)
                run.send(signal.SIGTERM, cell.target)
            return run.end()


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run, however it was started."""

    is_alive: Callable[[], bool]
    send: Callable[[signal.Signals, str], None]
    end: Callable[[], Ended]


@contextmanager
def _ranks(words: Sequence[str], env: dict[str, str], num_ranks: int) -> Iterator[Running]:
    with forked(words, env, num_ranks=num_ranks) as run:

        def send(number: signal.Signals, target: str) -> None:
            for rank in run.ranks[-1:] if target == "one rank" else run.ranks:
                if rank.is_alive():
                    assert rank.pid is not None
                    os.kill(rank.pid, number)

        yield Running(is_alive=run.ranks[0].is_alive, send=send, end=run.end)


@contextmanager
def _launched(words: Sequence[str], env: dict[str, str]) -> Iterator[Running]:
    process = subprocess.Popen(
        words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ranks: list[psutil.Process] = []

    def send(number: signal.Signals, target: str) -> None:
        ranks.extend(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])
        process.send_signal(number)

    def end() -> Ended:
        out, err = process.communicate(timeout=STUCK_S)
        orphans = [rank.pid for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
        assert not orphans, f"orphans: {orphans}"
        return Ended(status=process.returncode, out=out, err=err)

    try:
        yield Running(is_alive=lambda: process.poll() is None, send=send, end=end)
    finally:
        process.kill()


def _problem_at_stop(cell: Cell, ended: Ended) -> str:
    if "Traceback" in ended.both:
        return f"traceback\n{ended.both}"
    is_before = cell.phase in ("data", "restart")
    expected = {EXIT_STOPPED}
    if cell.signal == "SIGINT" and is_before:
        expected = {EXIT_INTERRUPTED}
    if (
        cell.signal == "SIGINT" and cell.phase == "first batch"
    ):  # which the check of the loss uses before the first step
        expected = {EXIT_STOPPED, EXIT_INTERRUPTED}
    if cell.signal == "twice" and cell.phase != "end":
        expected = {EXIT_STOPPED, EXIT_INTERRUPTED}
    if cell.phase == "end":
        expected = {0}
    if ended.status not in expected:
        return f"status {ended.status}, expected {expected}\n{ended.both}"
    return ""


def _difference(run_dir: Path, expected: Path) -> str:
    if training_lines(run_dir) != training_lines(expected):
        return "other metrics"
    tensors, whole = final_tensors(run_dir), final_tensors(expected)
    if tensors.keys() != whole.keys() or not all(torch.equal(tensors[key], whole[key]) for key in whole):
        return "other tensors"
    return ""


def run(cells: Sequence[Cell], *, say: Callable[[str], object] = print) -> int:
    """Run cells, report on them, and return how many are bad."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder))
        for cell in cells:
            try:
                problem = campaign.problem_of(cell)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                problem = str(error)
            counts["bad" if problem else "good"] += 1
            if problem:
                say(f"{cell}: {problem}")
    say(f"{counts['good']} of {len(cells)} cells are good")
    return counts["bad"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, count=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # runs would ignore it too where nohup started this
    sys.exit(run(chosen(CELLS, arguments.count, arguments.seed, arguments.part)) > 0)

"""The process of a trial: `shardlaunch run` in a folder of its own, started, followed by its metrics, and stopped."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from shardlaunch.checkpoints.files import make_folder
from shardlaunch.checkpoints.records import DamagedRecord, RunRecord, read_metrics_line, read_record
from shardlaunch.checkpoints.run_lock import LOCK, locked
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.tracking import METRICS_FILE, is_evaluation, last_evaluation
from shardlaunch.launcher.runs.folder import RUN
from shardlaunch.launcher.runs.result import FOLDS

LOG = "log.txt"
_MOST_QUOTED = 600
_STEPS = "number of steps (--epochs, --max-steps)"
_PARENT = "SHARDLAUNCH_SWEEP"
_COMMAND = (sys.executable, "-c", "from shardlaunch.launcher.commands.sweep.process import main; main()")
_PR_SET_PDEATHSIG = 1


class Evaluated(NamedTuple):
    """An evaluation of a trial, or its folds so far."""

    number: int
    """From 1, among the trial's evaluations or folds."""
    step: int
    metrics: Mapping[str, Any]
    is_last: bool


class TrialProcess:
    """The processes of a trial."""

    def __init__(self, folder: Path, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start `shardlaunch` with some words, and these variables too. What it prints is added to the folder's log."""
        make_folder(folder)
        self.folder = folder
        self.begun = time.monotonic()
        with open(folder / LOG, "ab") as log:
            self._from = log.tell()
            self._process = subprocess.Popen(
                [*_COMMAND, *words],
                env={**os.environ, **environment, _PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal of the terminal reaches the sweep alone, which passes it on
            )

    @property
    def pid(self) -> int:
        """Return the id of the process that starts the ranks."""
        return self._process.pid

    def status(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.poll()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the run to save and end, by a signal."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def message(self) -> str:
        """Return what the run has said last: its error message, or its last lines."""
        with open(self.folder / LOG, "rb") as log:
            log.seek(self._from)
            text = log.read().decode(errors="replace").strip()
        parts = re.split(r"^error: ", text, flags=re.M)
        said = parts[-1] if len(parts) > 1 else "\n".join(text.splitlines()[-1:])
        return said.strip()[:_MOST_QUOTED] or "no message"


def main() -> None:
    """Run the console command, in a process that gets SIGTERM when the sweep is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.pop(_PARENT, "") != str(os.getppid()):  # it was gone before
        sys.exit(1)
    from shardlaunch.launcher.commands.main import main as command

    command()


class Follower:
    """Reads the evaluations of a run as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: tuple[int, int] = (0, 0)  # its inode, and how far it is read
        self._found: dict[int, Mapping[str, Any]] = {}
        self._of_folds: list[Mapping[str, Any]] = []  # last evaluations of those that are complete
        self._steps: int | None = None

    def evaluations(self) -> Iterator[Evaluated]:
        """Yield the evaluations so far. Of a resumed run, those up to its checkpoint are as they were."""
        if (self._folder / FOLDS).exists() or (self._folder / "fold-1").is_dir():
            yield from self._folds()
            return
        self._read(self._folder / METRICS_FILE)
        steps = self._last_step()
        for number, step in enumerate(sorted(self._found), start=1):
            yield Evaluated(number, step, self._found[step], is_last=step == steps)

    def _read(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                begin = self._file[1] if self._file[0] == inode else 0  # a resume writes it anew
                file.seek(begin)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._file = (inode, begin + len(whole))
        for text in whole.splitlines():
            if b'"eval' not in text:
                continue
            with suppress(DamagedRecord):  # the run itself warns of it
                line = read_metrics_line(path, text)
                if is_evaluation(line):
                    self._found[line["step"]] = line

    def _last_step(self) -> int | None:
        if self._steps is None:
            with suppress(UserError):
                self._steps = read_record(self._folder / RUN, RunRecord).identity.get(_STEPS)
        return self._steps

    def _folds(self) -> Iterator[Evaluated]:
        """Yield, per fold that is complete, the metrics of all folds so far as lists."""
        is_complete = (self._folder / FOLDS).exists()
        number = 1
        while (self._folder / f"fold-{number}").is_dir():
            if not (is_complete or (self._folder / f"fold-{number + 1}").is_dir()):
                return
            if len(self._of_folds) < number:
                self._of_folds.append(last_evaluation(self._folder / f"fold-{number}"))
            lines = self._of_folds[:number]
            names = [name for name in lines[0] if all(name in line for line in lines)]
            metrics = {name: [line[name] for line in lines] for name in names}
            is_last = is_complete and not (self._folder / f"fold-{number + 1}").is_dir()
            yield Evaluated(number, lines[-1].get("step", 0), metrics, is_last)
            number += 1


def is_busy(folder: Path, pid: int, begun: float) -> bool:
    """Return whether processes of an earlier start still use a trial's folder, of which one had the id `pid`."""
    with suppress(psutil.Error):
        if abs(psutil.Process(pid).create_time() - begun) < 0.1:
            return True
    for one in (folder, *folder.glob("fold-*")):
        if (one / LOCK).exists():
            try:
                with locked(one):
                    pass
            except UserError:
                return True
    return False

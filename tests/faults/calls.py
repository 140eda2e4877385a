"""Run a small recipe in forked ranks, with a fault at the k-th file-system call of one of them (see shim.c)."""

import ctypes
import gc
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.distributed.ranks import free_port, rank_environment

SHIM = Path(__file__).with_name("shim.c")
RECIPE = Path(__file__).with_name("small_recipe.py")
STUCK_S = 60.0
COUNT, FAIL, SHORT, KILL = range(4)
_PRELOADED = "SHARDLAUNCH_TESTS_SHIM"


class Fault(NamedTuple):
    """What happens at calls `first` to `last`: each fails, the first is short and the others fail, or a kill."""

    mode: int = COUNT
    first: int = 0
    last: int = 0
    number: int = 0
    """The errno."""


NO_FAULT = Fault()


class Call(NamedTuple):
    """A file-system call below the folder of a run."""

    number: int
    name: str
    path: str
    other: str
    offset: int
    data: bytes
    changes: bool
    is_hit: bool

    def __str__(self) -> str:
        return f"call {self.number}: {self.name} {self.path}{' to ' if self.other else ''}{self.other}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a run went: each rank's exit status (a signal below 0), what was printed, and the calls of the armed rank."""

    statuses: list[int]
    output: str
    calls: list[Call]

    @property
    def hit(self) -> Call | None:
        """Return the call at which the fault was."""
        return next((call for call in self.calls if call.is_hit), None)


def under_the_shim() -> None:
    """Go on in a process with the shim preloaded, and with the libraries of a run loaded. Needs a C compiler."""
    if _PRELOADED not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="shim-"))
        built = folder / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, SHIM, "-ldl"], check=True)
        env = {**os.environ, "LD_PRELOAD": str(built), _PRELOADED: str(folder), "ACCELERATE_USE_CPU": "true"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
    del os.environ["LD_PRELOAD"]
    shutil.rmtree(os.environ.pop(_PRELOADED))
    import tests.distributed.preloaded
    import tests.recipes  # noqa: F401

    gc.collect()
    gc.freeze()


def run_ranks(
    words: Sequence[str],
    below: Path,
    *,
    num_ranks: int = 1,
    armed_rank: int = 0,
    fault: Fault = NO_FAULT,
    records_data: bool = False,
    work: Callable[[], None] | None = None,
) -> Trial:
    """Run the recipe file with these words (or `work`) in forked ranks, with a fault in one of them."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        port = free_port()
        ranks = []
        for rank in range(num_ranks):
            ranks.append(os.fork())
            if not ranks[-1]:
                try:
                    if num_ranks > 1:
                        os.environ |= rank_environment(rank, num_ranks, port)
                    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
                    if rank == armed_rank:
                        _arm(below, log, fault, records_data=records_data, only_changes=fault.mode == KILL)
                    sys.argv = [str(RECIPE), *words]
                    if work is None:
                        runpy.run_path(str(RECIPE), run_name="__main__")
                    else:
                        work()
                except SystemExit as end:
                    os._exit(int(end.code or 0))
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
        statuses = _ends(ranks)
        output = out.read_text(errors="replace") if out.exists() else ""
        return Trial(statuses=statuses, output=output, calls=_read(log, has_data=records_data))


def _arm(below: Path, log: Path, fault: Fault, *, records_data: bool, only_changes: bool) -> None:
    shim = ctypes.CDLL(None)
    shim.shim_arm(
        str(below).encode(),
        str(log).encode(),
        ctypes.c_long(fault.first),
        ctypes.c_long(fault.last),
        fault.mode,
        fault.number,
        records_data,
        only_changes or records_data,
    )


def _ends(ranks: Sequence[int]) -> list[int]:
    """Wait for processes and return their exit statuses; one that does not end has that of SIGALRM."""
    end = time.monotonic() + STUCK_S
    statuses: dict[int, int] = {}
    while len(statuses) < len(ranks):
        for rank in ranks:
            if rank not in statuses:
                ended, status = os.waitpid(rank, os.WNOHANG)
                if ended:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(rank, signal.SIGKILL)
                    os.waitpid(rank, 0)
                    statuses[rank] = -signal.SIGALRM
        time.sleep(0.002)
    return [statuses[rank] for rank in ranks]


def _read(log: Path, *, has_data: bool) -> list[Call]:
    calls = []
    if not log.exists():
        return []
    with open(log, "rb") as file:
        while line := file.readline():
            number, name, path, other, offset, size, changes, hit = line.decode().rstrip("\n").split("\t")
            data = file.read(int(size)) if has_data and name == "write" else b""
            calls.append(Call(int(number), name, path, other, int(offset), data, changes == "1", hit == "hit"))
    return calls

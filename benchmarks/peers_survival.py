"""The same faults for four tools that train the same little task: what is lost, and does the same command go on?

    python benchmarks/peers_survival.py --lightning-python VENV/bin/python      # all cells: about 20 minutes
    python benchmarks/peers_survival.py --tools trainer --cells SIGTERM         # those whose names match

The task (benchmarks/survival/task.py): a perceptron with dropout, 48 steps in three epochs, a save every 10 steps and
an evaluation every 8, on 1 rank and on 2 under DDP over gloo. Each tool trains it as its own documentation has it for
runs that may be interrupted (benchmarks/survival/with_*.py), and is started by its launcher: torchrun, or ours.

A cell is a fault: a signal in a phase of the run to the launcher, to one rank or to all; SIGKILL of a rank, or at a
file-system call within a save (tests/faults/shim.c; needs a C compiler); a checkpoint cut short. Then the same command
runs again. Each is compared with an undisturbed run of the same tool: samples of each step, and bits of the weights.

Lightning is no dependency of this project: `pip install lightning torchdata` into an environment of its own, whose
interpreter --lightning-python names; without it, Lightning is left out. A run is given TMPDIR on its own disk.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import psutil
from record import machine, versions, write_result
from survival import judging

HERE = Path(__file__).resolve().parent
SHIM = HERE.parent / "tests" / "faults" / "shim.c"
NUM_CALLS = 4  # kills within a save
WAIT_S = 45.0  # for the end of a start that met a fault: beyond the grace time, a hang
RESUME_S = 180.0
AFTER_S = 0.5  # from a signal until the run, which waits for it, goes on
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SURVIVAL_")
NEVER = 10**9
TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # the first four are its default


@dataclass(frozen=True)
class Cell:
    """A fault."""

    fault: str
    phase: str
    target: str
    num_ranks: int
    number: int = 0
    """Which of the kills within a save, or of the damages."""

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"
        return f"{self.fault} {self.phase}, {self.target}, {ranks}" if self.target else f"{self.fault} {self.phase}"


CELLS = (
    *(Cell("SIGTERM", phase, "launcher", 2) for phase in ("step", "evaluation", "saving")),
    Cell("SIGTERM", "step", "one rank", 2),
    Cell("SIGINT", "step", "launcher and ranks", 2),  # as Ctrl-C
    *(Cell(name, "step", "launcher", 2) for name in ("SIGUSR1", "SIGHUP")),
    *(Cell("SIGTERM", phase, "no launcher", 1) for phase in ("start-up", "step", "evaluation", "saving")),
    *(Cell(name, "step", "no launcher", 1) for name in ("SIGINT", "SIGUSR1")),
    *(Cell("SIGKILL", phase, "one rank", 2) for phase in ("step", "saving")),
    *(Cell("SIGKILL", f"within a save ({number + 1} of {NUM_CALLS})", "", 1, number) for number in range(NUM_CALLS)),
    Cell("newest checkpoint:", "largest file cut to half", "", 1),
    Cell("newest checkpoint:", "all files empty", "", 1, 1),
)


@dataclass(kw_only=True)
class Tool:
    """A tool: how its runs are started, and what its newest checkpoint is."""

    name: str
    script: str
    python: str
    newest: Callable[[Path], list[Path]]
    is_ours: bool = False
    whole: dict[int, Path] = field(default_factory=dict)
    """Folders of undisturbed runs by number of ranks."""

    def words(self, num_ranks: int) -> list[str]:
        """Return the command."""
        script = str(HERE / "survival" / self.script)
        if num_ranks == 1:
            return [self.python, script]
        if self.is_ours:
            return [self.python, "-m", "shardlaunch", "run", script, "--ranks", str(num_ranks)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        return [self.python, *launcher, "--signals-to-handle", TORCHRUN_SIGNALS, script]


def _newest_folder(pattern: str) -> Callable[[Path], list[Path]]:
    def newest(run_dir: Path) -> list[Path]:
        folder = max(run_dir.glob(pattern), key=lambda path: int(re.findall(r"\d+", path.name)[-1]))
        return [path for path in folder.rglob("*") if path.is_file()]

    return newest


def _tools(lightning_python: str) -> list[Tool]:
    here = sys.executable
    tools = [
        Tool(
            name="shardlaunch",
            script="with_shardlaunch.py",
            python=here,
            newest=_newest_folder("checkpoints/step-*"),
            is_ours=True,
        ),
        Tool(name="Trainer", script="with_trainer.py", python=here, newest=_newest_folder("checkpoint-*")),
        Tool(name="accelerate", script="with_accelerate.py", python=here, newest=_newest_folder("step_*")),
    ]
    if lightning_python:
        tools.append(
            Tool(
                name="Lightning",
                script="with_lightning.py",
                python=lightning_python,
                newest=lambda run_dir: [run_dir / "last.ckpt"],
            )
        )
    else:
        print("Lightning is left out: --lightning-python names no interpreter that has it", file=sys.stderr)
    return tools


class Campaign:
    """Runs cells in a folder."""

    def __init__(self, folder: Path, dropout: float) -> None:
        self._folder = folder
        self._dropout = dropout
        self._count = 0
        self._lock = Lock()
        self._shim = folder / "shim.so"
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(self._shim), str(SHIM), "-ldl"]
        if not shutil.which("cc"):
            sys.exit("a C compiler (cc) is needed for the kills within a save")
        subprocess.run(command, check=True)

    def prepare(self, tool: Tool, num_ranks: int) -> None:
        """Train undisturbed; on one rank, count the changes of files of a save."""
        folder = self._new_folder(tool)
        ended = self._start(tool, num_ranks, folder, 0, call=NEVER if num_ranks == 1 else 0)
        if not ended["is_finished"]:
            sys.exit(f"{tool.name} does not train on {num_ranks} ranks:\n{(folder / 'out-0').read_text()}")
        tool.whole[num_ranks] = folder

    def row_of(self, tool: Tool, cell: Cell) -> dict[str, Any]:
        """Run a cell and return what came of it."""
        folder = self._new_folder(tool)
        whole = tool.whole[cell.num_ranks]
        if "within a save" in cell.phase:
            num_calls = int((whole / "num-calls").read_text())
            call = 1 + int((cell.number + 0.5) * num_calls / NUM_CALLS)
            first = self._start(tool, cell.num_ranks, folder, 0, call=call)
            if first["status"] != -signal.SIGKILL:
                raise RuntimeError(f"{tool.name}, {cell}: call {call} was not reached")
        elif cell.fault.startswith("SIG"):
            first = self._start(tool, cell.num_ranks, folder, 0, cell=cell)
        else:
            first = self._start(tool, cell.num_ranks, folder, 0, cell=Cell("SIGKILL", "step", "no launcher", 1))
            _damage(tool.newest(folder / "run"), cell.number)
        second = {} if first["is_finished"] else self._start(tool, cell.num_ranks, folder, 1)
        is_finished = (first if first["is_finished"] else second)["is_finished"]
        begun = judging.steps_of(folder, 0)
        steps = [begun[: judging.num_updates(folder, 0)], judging.steps_of(folder, 1)]
        expected = judging.steps_of(whole, 0)
        row = {
            "tool": tool.name,
            "cell": str(cell),
            "fault": cell.fault,
            "first": first,
            "second": second,
            "is_finished": is_finished,
            "lost": judging.num_lost(expected, *steps) if is_finished else 0,
            "is_same_data": is_finished and judging.same_data(expected, *steps),
            "is_same_weights": is_finished and (folder / "final").read_text() == (whole / "final").read_text(),
        }
        (folder / "row.json").write_text(json.dumps(row))
        print(f"{tool.name:12} {cell!s:50} {judging.verdict(row)}", flush=True)
        return row

    def _new_folder(self, tool: Tool) -> Path:
        with self._lock:
            self._count += 1
            folder = self._folder / f"{tool.name}-{self._count}"
        (folder / "tmp").mkdir(parents=True)
        return folder

    def _start(
        self, tool: Tool, num_ranks: int, folder: Path, start: int, *, cell: Cell | None = None, call: int = 0
    ) -> dict[str, Any]:
        """Start a run, send it the signal of a cell if there is one, and return how it ended."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCH_VARIABLES)}
        env |= {"SURVIVAL_DIR": str(folder), "SURVIVAL_START": str(start), "TMPDIR": str(folder / "tmp")}
        env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        env |= {"SURVIVAL_DROPOUT": str(self._dropout)}
        if cell:
            env["SURVIVAL_PHASE"] = cell.phase
        if call:
            env |= {"SURVIVAL_CALL": str(call), "LD_PRELOAD": str(self._shim)}
        with open(folder / f"out-{start}", "wb") as out:
            process = subprocess.Popen(
                tool.words(num_ranks), env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        family: set[psutil.Process] = set()
        if cell:
            _wait_for(folder, cell, process)
            family = _family(process, folder, start)
            _send(cell, process, folder)
        begin = time.monotonic()
        if cell:
            time.sleep(AFTER_S)
            (folder / "go").touch()
        with suppress(subprocess.TimeoutExpired):
            process.wait(WAIT_S if cell else RESUME_S)
        seconds = time.monotonic() - begin
        time.sleep(1)
        orphans = [other for other in family | _family(process, folder, start) if _is_alive(other)]
        for other in orphans:
            with suppress(psutil.NoSuchProcess):
                other.kill()
        status = process.poll() if process.poll() is not None else -signal.SIGALRM
        process.kill()
        process.wait()
        is_finished = (folder / "final").exists()
        return {
            "status": status,
            "seconds": round(seconds, 1) if cell else 0.0,
            "orphans": len(orphans),
            "is_finished": is_finished,
        }


def _wait_for(folder: Path, cell: Cell, process: subprocess.Popen[bytes]) -> None:
    """Wait until the ranks are in the phase of a cell; only the first one saves."""
    marks = ["mark-0"] if cell.phase == "saving" else [f"mark-{rank}" for rank in range(cell.num_ranks)]
    end = time.monotonic() + RESUME_S
    while not all((folder / mark).exists() for mark in marks):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{cell} was not reached:\n{(folder / 'out-0').read_text()}")
        time.sleep(0.02)
    time.sleep(0.2)


def _send(cell: Cell, process: subprocess.Popen[bytes], folder: Path) -> None:
    ranks = [int((folder / f"pid-0-{rank}").read_text()) for rank in range(cell.num_ranks)]
    # Rank 0 is the one that saves.
    one = ranks[0] if cell.phase == "saving" else ranks[-1]
    targets = {
        "launcher": [process.pid],
        "one rank": [one],
        "all ranks": ranks,
        "launcher and ranks": [process.pid, *ranks],
        "no launcher": ranks,
    }
    for pid in targets[cell.target]:
        os.kill(pid, signal.Signals[cell.fault])


def _family(process: subprocess.Popen[bytes], folder: Path, start: int) -> set[psutil.Process]:
    """Return the processes of a start besides the first one, as far as they are known."""
    found = set()
    with suppress(psutil.NoSuchProcess):
        found.update(psutil.Process(process.pid).children(recursive=True))
    for path in folder.glob(f"pid-{start}-*"):
        with suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(int(path.read_text())))
    return {other for other in found if other.pid != process.pid}


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _damage(files: Sequence[Path], number: int) -> None:
    """Cut the largest file to half, or all files to nothing."""
    largest = max(files, key=lambda path: path.stat().st_size)
    for path in files if number else [largest]:
        os.truncate(path, 0 if number else path.stat().st_size // 2)


def _versions(tools: Sequence[Tool]) -> dict[str, str]:
    found = versions("torch", "transformers", "accelerate")
    for tool in tools:
        if tool.name == "Lightning":
            words = [tool.python, "-c", "from importlib.metadata import version; print(version('lightning'))"]
            found["lightning"] = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    return found


def main() -> None:
    """Run the cells and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="", help="regular expression: only these tools")
    parser.add_argument("--cells", default="", help="regular expression: only these faults")
    parser.add_argument("--lightning-python", default="", help="the interpreter of an environment that has Lightning")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the model; 0: no random numbers in a step")
    parser.add_argument("--at-once", type=int, default=2, help="cells that run at a time")
    parser.add_argument("--keep", default="", help="a folder that keeps what the runs left, to look at")
    parser.add_argument("--note", default="", help="stands with the figures")
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    args = parser.parse_args()
    # A shell that starts this in the background may have them ignored, and so would the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    tools = [tool for tool in _tools(args.lightning_python) if re.search(args.tools, tool.name, re.IGNORECASE)]
    cells = [cell for cell in CELLS if re.search(args.cells, str(cell))]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.at_once) as pool:
        campaign = Campaign(Path(args.keep or name).resolve(), args.dropout)
        pairs = [(tool, num_ranks) for tool in tools for num_ranks in sorted({cell.num_ranks for cell in cells})]
        list(pool.map(lambda pair: campaign.prepare(*pair), pairs))
        rows = list(pool.map(lambda pair: campaign.row_of(*pair), [(tool, cell) for cell in cells for tool in tools]))
    report = {
        "benchmark": "peers_survival",
        "what": "peers_survival",
        "note": args.note,
        "machine": machine(),
        "versions": _versions(tools),
        "cells": rows,
    }
    for line in judging.count_table(report):
        print(f"{line[0]:52}" + "".join(f"{cell:>14}" for cell in line[1:]))
    if args.result:
        write_result(args.result, report)


if __name__ == "__main__":
    main()

"""Runs of a recipe on hosts that are namespaces of this machine, compared with one process."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from shardlaunch.errors import EXIT_USER_ERROR
from tests.launch.checks import assert_one_message, logged_steps
from tests.launch.command import PYTHON, STUCK_S, Ended, environment, forked_end_of
from tests.launch.hosts import Host, ends_on
from tests.recipes import losses

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
import torch
from shardlaunch import Options, Recipe, launch, option
from shardlaunch.data import derived, load_splits

@dataclass(kw_only=True)
class RowsOptions(Options):
    data: str = option(str(Path(__file__).with_name("rows.csv")), mark="free")
    global_batch_size: int = 24
    micro_batch_size: int = 1
    max_steps: int = 4
    lr: float = 0.1
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Rows(Recipe):
    options: RowsOptions

    def datasets(self):
        columns = {name: "number" for name in "abcd"}
        splits = load_splits(self.options.data, seed=0, columns=columns)
        return {name: derived(split, self.summed, key=("summed",)) for name, split in splits.items()}

    def summed(self, rows):
        return {"label": [int(sum(row) > 2) for row in zip(*(rows[name] for name in "abcd"))]}

    def collate(self, samples, seeds):
        inputs = torch.tensor([[float(sample[name]) for name in "abcd"] for sample in samples])
        return {"inputs": inputs, "labels": torch.tensor([sample["label"] for sample in samples])}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))

    def loss(self, outputs, batch):
        time.sleep(float(os.environ.get("PACE_S", "0")))
        if str(self.moment.step) == os.environ.get("KILLED_AT") and not self.moment.is_evaluation:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

launch(Rows)
"""
NUM_ROWS = 100


class Runs:
    """Runs a recipe on hosts, whose runs are to be as one process has them."""

    def __init__(self, folder: Path, hosts: Sequence[Host], hf_home: Path) -> None:
        """The hosts share all files but `hf_home` and `folder`/memory."""
        self.folder = folder
        self.hosts = hosts
        self.recipe = folder / "rows.py"
        self.recipe.write_text(RECIPE)
        rows = "".join(f"{row % 7 / 7},{row % 5 / 5},{row % 3 / 3},{row % 2}\n" for row in range(NUM_ROWS))
        (folder / "rows.csv").write_text(f"a,b,c,d\n{rows}")
        (folder / "memory").mkdir()
        hf_home.mkdir(exist_ok=True)
        for host in hosts:
            host.mount(self.own(host, "memory"), folder / "memory")
            host.mount(self.own(host, "hf"), hf_home)
        memory = {"SHARDLAUNCH_MEMORY_DIR": str(folder / "memory" / "runs")}
        extensions = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
        self.env = environment(hf_home, memory | extensions)
        self._one: dict[int, dict[int, float]] = {}
        self._count = 0

    def own(self, host: Host, name: str) -> Path:
        """Return a folder that only this host sees under another path."""
        path = self.folder / "local" / host.name / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def new_dir(self) -> Path:
        """Return the folder of the next run."""
        self._count += 1
        return self.folder / f"run-{self._count}" / "out"

    def words(self, run_dir: Path, *options: str) -> list[str]:
        """Return the command line of a run."""
        return [*PYTHON, str(self.recipe), "--output-dir", str(run_dir), *options]

    def layout(self, ranks: Sequence[int]) -> list[tuple[Host, int]]:
        """Return hosts with so many ranks each."""
        return [(host, num_ranks) for host, num_ranks in zip(self.hosts, ranks, strict=False) if num_ranks]

    def forked(self, ranks: Sequence[int], run_dir: Path, *options: str, **env: str) -> list[Ended]:
        """Run on so many ranks of each host, until all have ended."""
        return ends_on(self.layout(ranks), self.words(run_dir, *options), self.env | env)

    def launched(self, words_of: Callable[[int], Sequence[str]], num_hosts: int) -> list[Ended]:
        """Run a command line on each host, with its number, until all have ended."""
        with ExitStack() as stack:
            running = []
            for number, host in enumerate(self.hosts[:num_hosts]):
                files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
                process = subprocess.Popen(
                    host.words(words_of(number)),
                    env=self.env,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=files[0],
                    stderr=files[1],
                )
                stack.callback(process.wait)
                stack.callback(process.kill)
                running.append((process, files))
            ends = []
            for process, files in running:
                status = process.wait(STUCK_S)
                out, err = (file.seek(0) or file.read() for file in files)
                ends.append(Ended(status=status, out=out, err=err))
            return ends

    def problem(self, ends: Sequence[Ended], run_dir: Path, *, num_ranks: int, says: str = "") -> str:
        """Return what is wrong with a run that was to go well."""
        if any(ended.status for ended in ends):
            return all_of(ends)
        said = " ".join(ends[0].out.split())
        if f"{num_ranks} x CPU" not in said or says not in said or "warning:" in said or "Traceback" in ends[0].err:
            return all_of(ends)
        if any(own_lines(ended.out) for ended in ends[1:]):
            return f"other hosts print too: {all_of(ends)}"
        return self.difference(run_dir)

    def difference(self, run_dir: Path, *, steps: int = 4) -> str:
        """Return what is other than in one process."""
        if steps not in self._one:
            one = self.new_dir()
            ended = forked_end_of(self.words(one, "--max-steps", str(steps)), self.env)
            assert ended.status == 0, ended.both
            self._one[steps] = losses(one)
        mine, others = losses(run_dir), self._one[steps]
        same = mine.keys() == others.keys() and all(abs(mine[step] - others[step]) < 1e-5 for step in mine)
        return "" if same else f"other losses: {mine}, {others}"

    def refused(
        self, ranks: Sequence[int], run_dir: Path, says: Sequence[str], *options: str, each: bool = False, **env: str
    ) -> str:
        """Run what is to be refused at the start, on all hosts, with one message, or with `each` one of each host."""
        ends = self.forked(ranks, run_dir, *options, **env)
        if {ended.status for ended in ends} != {EXIT_USER_ERROR}:
            return all_of(ends)
        said = [own_lines(ended.err) for ended in ends]
        try:
            for err in said if each else ["".join(said)]:
                assert_one_message(Ended(status=EXIT_USER_ERROR, out="", err=err), says)
        except AssertionError as error:
            return str(error)
        return "it has trained" if (run_dir / "metrics.jsonl").exists() and logged_steps(run_dir) else ""


def own_lines(out: str) -> str:
    """Return what a rank of ours prints.

    Not what a launcher does, DeepSpeed when it is loaded, and torch on networks without name servers.
    """
    lines = (line for line in out.splitlines() if not re.search(r"^\$ |get_accelerator|\[W.* socket\.cpp", line))
    return "".join(f"{line}\n" for line in lines)


def all_of(ends: Sequence[Ended]) -> str:
    return "\n".join(f"--- host {number}: {ended.both}" for number, ended in enumerate(ends, 1))

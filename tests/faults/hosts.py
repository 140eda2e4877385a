"""Run a recipe on two and three hosts of this machine, alike and unlike: python -m tests.faults.hosts [--only WORD].

Hosts are namespaces with networks, names, caches and memory folders of their own; without the right to make them, it
says so and ends with status 0. Each file of accelerate_configs/multi_node/ is started to the letter of its comment.
Runs are compared with one process. Prints a table; the exit status is 1 if a case is bad.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import accelerate.commands.launch

from shardlaunch.errors import EXIT_USER_ERROR
from tests.launch.checks import assert_one_message, logged_steps
from tests.launch.command import ACCELERATE, PYTHON, SHARDLAUNCH, STUCK_S, TORCHRUN, Ended, environment, forked_end_of
from tests.launch.hosts import Host, ends_on, forked_at, forked_on, hosts_of, why_not
from tests.recipes import losses

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs" / "multi_node").glob("*.yaml"))
ADDRESSES = {"host-1": "10.0.0.1", "host-2": "10.0.0.2", "host-3": "10.0.0.3"}
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
HANG_AFTER_S = 3


class Campaign:
    """Runs cases on hosts, whose runs are to be as one process has them."""

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
            return _all_of(ends)
        said = " ".join(ends[0].out.split())
        if f"{num_ranks} x CPU" not in said or says not in said or "warning:" in said or "Traceback" in ends[0].err:
            return _all_of(ends)
        if any(_own(ended.out) for ended in ends[1:]):
            return f"other hosts print too: {_all_of(ends)}"
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

    def configured(self, config: Path, *, as_it_is: bool = False, forks: bool = False) -> str:
        """Start a file of accelerate to the letter of its comment, with fewer ranks unless `as_it_is`.

        With `forks`, the launchers are forked, which saves the time of their imports.
        """
        name = config.stem.removesuffix("_offload")
        text = config.read_text()
        num_ranks = 16
        if not as_it_is:
            num_ranks = 4 if name == "hsdp" else 2
            text = text.replace("num_processes: 16 ", f"num_processes: {num_ranks} ")
            text = text.replace("dp_shard_size: 8 ", "dp_shard_size: 2 ")
        own = self.folder / config.name
        own.write_text(text)
        (comment,) = re.findall(r"^# On each machine, with its own rank:\n#   (accelerate launch .*)$", text, re.M)
        run_dir = self.new_dir()
        places = {str(config.relative_to(ROOT)): str(own), "recipes/bert_imdb.py": str(self.recipe)}

        def words_of(number: int) -> list[str]:
            program, _, *words = shlex.split(comment.replace("--machine_rank 0 ", f"--machine_rank {number} "))
            assert program == "accelerate"
            assert {*places, str(number)} <= {*words}
            return [*ACCELERATE, *(places.get(word, word) for word in words), "--output-dir", str(run_dir)]

        if forks:
            with ExitStack() as stack:
                script = [*PYTHON, accelerate.commands.launch.__file__]
                running = [
                    stack.enter_context(forked_at(host, [*script, *words_of(number)[len(ACCELERATE) :]], [self.env]))
                    for number, host in enumerate(self.hosts[:2])
                ]
                ends = [run.end() for run in running]
        else:
            ends = self.launched(words_of, 2)
        return self.problem(ends, run_dir, num_ranks=num_ranks, says=name)

    def uneven(self, strategy: str, *ranks: int) -> str:
        """Run on hosts with unequal numbers of ranks, each of which prepares the data for itself."""
        run_dir = self.new_dir()
        for host in self.hosts:
            shutil.rmtree(self.own(host, "hf") / "datasets", ignore_errors=True)
        ends = self.forked(ranks, run_dir, "--strategy", strategy)
        problem = self.problem(ends, run_dir, num_ranks=sum(ranks), says=strategy)
        return problem or self.unprepared(self.layout(ranks))

    def unprepared(self, layout: Sequence[tuple[Host, int]]) -> str:
        """Return what is wrong with the hosts' own caches."""
        names = {
            host.name: sorted(path.name for path in self.own(host, "hf").rglob("shardlaunch/*.arrow"))
            for host, _ in layout
        }
        same = len({tuple(found) for found in names.values()}) == 1
        return "" if same and len(names[layout[0][0].name]) >= 2 else f"caches: {names}"

    def agents(self, words_of: Callable[[int], Sequence[str]], ranks: Sequence[int], *, end: Sequence[str]) -> str:
        """Run under a launcher per host, with unequal numbers of ranks."""
        run_dir = self.new_dir()
        options = [*end, "--strategy", "fsdp2", "--output-dir", str(run_dir)]
        ends = self.launched(lambda number: [*words_of(number), str(self.recipe), *options], len(ranks))
        return self.problem(ends, run_dir, num_ranks=sum(ranks), says="fsdp2")

    def refused(self, ranks: Sequence[int], run_dir: Path, says: Sequence[str], *options: str, **env: str) -> str:
        """Run what is to be refused at the start, once and on all hosts."""
        ends = self.forked(ranks, run_dir, *options, **env)
        if {ended.status for ended in ends} != {EXIT_USER_ERROR}:
            return _all_of(ends)
        err = "".join(_own(ended.err) for ended in ends)
        try:
            assert_one_message(Ended(status=EXIT_USER_ERROR, out="", err=err), says)
        except AssertionError as error:
            return str(error)
        return "it has trained" if (run_dir / "metrics.jsonl").exists() and logged_steps(run_dir) else ""

    def not_shared(self, ranks: Sequence[int], without: int, *, kind: str) -> str:
        """Run where one host, by its number, does not share the output folder: it is of its own, or read-only."""
        run_dir = self.new_dir()
        run_dir.parent.mkdir()
        host = self.hosts[without]
        first_rank = sum(ranks[:without])
        says = ["is not shared between the hosts", f"rank {first_rank}, on {host.name}", "all hosts have mounted"]
        if kind == "read-only":
            host.mount(run_dir.parent, run_dir.parent, read_only=True)
            says = ["cannot be written by", f"rank {first_rank}, on {host.name}", "let all of them write there"]
        else:
            host.mount(self.own(host, run_dir.parent.name), run_dir.parent)
        return self.refused(ranks, run_dir, says)

    def no_data(self) -> str:
        """Run where one host does not have the data."""
        data = self.folder / "data"
        data.mkdir()
        (data / "rows.csv").write_bytes((self.folder / "rows.csv").read_bytes())
        self.hosts[1].mount(self.own(self.hosts[1], "data"), data)
        return self.refused((1, 2), self.new_dir(), ["rows.csv", "host-2"], "--data", str(data / "rows.csv"))

    def other_data(self) -> str:
        """Run where one host has other data under the same path."""
        data = self.folder / "other"
        data.mkdir()
        text = (self.folder / "rows.csv").read_text()
        (data / "rows.csv").write_text(text)
        (self.own(self.hosts[1], "other") / "rows.csv").write_text(text.replace("0.0", "0.1", 1))
        self.hosts[1].mount(self.own(self.hosts[1], "other"), data)
        says = ["rank 1 has other options or data than rank 0"]
        return self.refused((1, 2), self.new_dir(), says, "--data", str(data / "rows.csv"))

    def loopback_names(self) -> str:
        """Run where the name of each host has the address 127.0.1.1 there, as Debian sets it up."""
        hosts = self.hosts[:2]
        for host in hosts:
            file = self.folder / f"hosts-of-{host.name}"
            file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
            host.mount(file, Path("/etc/hosts"))
        try:
            problem = self.refused((1, 1), self.new_dir(), ["GLOO_SOCKET_IFNAME"])
            run_dir = self.new_dir()
            ends = self.forked((1, 1), run_dir, GLOO_SOCKET_IFNAME="eth0")
            return problem or self.problem(ends, run_dir, num_ranks=2)
        finally:
            for host in hosts:
                host.must("umount", "/etc/hosts")

    def lost_memory(self) -> str:
        """Lose the first host of three, with its memory, and go on on the others from what they have in theirs."""
        run_dir = self.new_dir()
        options = ("--replicate-every", "2", "--max-steps", "10", "--save-every", "0", "--async-save", "off")
        killed = self.forked((1, 2, 1), run_dir, *options, KILLED_AT="7", PACE_S="0.01")
        if not all(ended.status for ended in killed):
            return _all_of(killed)
        ends = self.forked((0, 2, 1), run_dir, *options)
        if any(ended.status for ended in ends) or "brought back step 6 from memory" not in ends[0].out:
            return _all_of(ends)
        return self.difference(run_dir, steps=10)

    def lost_link(self) -> str:
        """Take out the cable of a host: all ranks end, and the run goes on on the other."""
        run_dir = self.new_dir()
        options = ("--max-steps", "30", "--save-every", "2", "--hang-after-s", str(HANG_AFTER_S))
        words = self.words(run_dir, *options)
        with forked_on(self.layout((1, 2)), words, self.env | {"PACE_S": "0.01"}) as runs:
            limit = time.monotonic() + STUCK_S
            while not run_dir.exists() or logged_steps(run_dir) < 8:
                assert time.monotonic() < limit
                time.sleep(0.01)
            self.hosts[1].set_link("down")
            try:
                ends = [run.end() for run in runs]
            finally:
                self.hosts[1].set_link("up")
        if not all(ended.status for ended in ends) or any("Traceback" in ended.both for ended in ends):
            return _all_of(ends)
        again = self.forked((1,), run_dir, *options)
        if again[0].status:
            return _all_of(again)
        return self.difference(run_dir, steps=30)


def _own(out: str) -> str:
    """Return what we print: not what DeepSpeed does when it is loaded, and torch on networks without name servers."""
    lines = (line for line in out.splitlines() if not re.search(r"get_accelerator|\[W.* socket\.cpp", line))
    return "".join(f"{line}\n" for line in lines)


def _all_of(ends: Sequence[Ended]) -> str:
    return "\n".join(f"--- host {number}: {ended.both}" for number, ended in enumerate(ends, 1))


def cases(campaign: Campaign) -> dict[str, Callable[[], str]]:
    """Return the cases by name; each returns what is wrong."""
    static = ("--nnodes=3", "--master-addr=10.0.0.1", "--master-port=29500")
    ranks = (1, 2, 1)
    torchrun = TORCHRUN[: TORCHRUN.index("--standalone")]
    found: dict[str, Callable[[], str]] = {}
    for config in CONFIGS:
        found[f"multi_node/{config.name}, 2 hosts"] = lambda config=config: campaign.configured(config)  # type: ignore[misc]
    for config in CONFIGS:
        if config.stem in ("ddp", "hsdp"):
            found[f"multi_node/{config.name} as it is, 2 hosts x 8"] = lambda config=config: campaign.configured(  # type: ignore[misc]
                config, as_it_is=True
            )
    for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
        found[f"{strategy}, 1 + 2 ranks"] = lambda strategy=strategy: campaign.uneven(strategy, 1, 2)  # type: ignore[misc]
        found[f"{strategy}, 1 + 2 + 1 ranks"] = lambda strategy=strategy: campaign.uneven(strategy, 1, 2, 1)  # type: ignore[misc]
    return found | {
        "hsdp, 2 + 4 ranks": lambda: campaign.uneven("hsdp", 2, 4),
        "hsdp, 1 + 2 + 1 ranks": lambda: campaign.refused(
            ranks,
            campaign.new_dir(),
            ["4 ranks, on machines of 1 and 2, cannot be divided", "Give --shard-ranks 2"],
            "--strategy",
            "hsdp",
        ),
        "torchrun, 1 + 2 + 1 ranks": lambda: campaign.agents(
            lambda number: [*torchrun, *static, f"--node-rank={number}", f"--nproc-per-node={ranks[number]}"],
            ranks,
            end=(),
        ),
        "shardlaunch run, 2 + 1 ranks": lambda: campaign.agents(
            lambda number: [
                *(*SHARDLAUNCH, "run", "--hosts", "2", "--rendezvous", "host-1:29400"),
                *("--ranks", str((2, 1)[number])),
            ],
            (2, 1),
            end=("--",),
        ),
        "no shared output folder, 1 + 2 ranks": lambda: campaign.not_shared((1, 2), 1, kind="own"),
        "no shared output folder on the third of three": lambda: campaign.not_shared(ranks, 2, kind="own"),
        "output folder read-only on a host": lambda: campaign.not_shared((1, 2), 1, kind="read-only"),
        "no data on a host": campaign.no_data,
        "other data on a host": campaign.other_data,
        "host names of loopback": campaign.loopback_names,
        "a host lost, its state in the next one's memory": campaign.lost_memory,
        "a cable out": campaign.lost_link,
    }


def run(only: str = "", say: Callable[[str], None] = print) -> int:
    """Run the cases, print a table, and return the number of those that are bad."""
    num_bad = 0
    with tempfile.TemporaryDirectory(prefix="shardlaunch-hosts-") as name, hosts_of(ADDRESSES) as hosts:
        os.environ["HF_HOME"] = str(Path(name) / "hf")  # the libraries read it before they are forked
        campaign = Campaign(Path(name), hosts, Path(name) / "hf")
        for case, problem_of in cases(campaign).items():
            if only not in case:
                continue
            began = time.monotonic()
            try:
                problem = problem_of()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                problem = repr(error)
            num_bad += bool(problem)
            say(f"{'bad' if problem else 'ok ':4} {time.monotonic() - began:5.0f} s  {case}  {problem}")
    return num_bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    only = parser.parse_args().only
    if reason := why_not():
        print(f"skipped: {reason}")
        sys.exit(0)
    sys.exit(1 if run(only) else 0)

"""Run a recipe on two and three hosts of this machine, alike and unlike: python -m tests.faults.hosts [--only WORD].

Hosts are namespaces with networks, names, caches and memory folders of their own; without the right to make them, it
says so and ends with status 0. Each file of accelerate_configs/multi_node/ is started to the letter of its comment.
Runs are compared with one process. Prints a table; the exit status is 1 if a case is bad.
"""

import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import accelerate.commands.launch

from tests.faults.cases import main_of_cases, run_cases
from tests.faults.host_runs import ROOT, Runs, all_of
from tests.launch.checks import logged_steps
from tests.launch.command import ACCELERATE, PYTHON, SHARDLAUNCH, STUCK_S, TORCHRUN
from tests.launch.hosts import Host, forked_at, forked_on, hosts_of, why_not

CONFIGS = sorted((ROOT / "accelerate_configs" / "multi_node").glob("*.yaml"))
ADDRESSES = {"host-1": "10.0.0.1", "host-2": "10.0.0.2", "host-3": "10.0.0.3"}
HANG_AFTER_S = 3


class Campaign(Runs):
    """Runs cases on hosts; each returns what is wrong."""

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
            others = "".join(f"{other.address} {other.name}\n" for other in hosts if other is not host)
            file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
            host.mount(file, Path("/etc/hosts"))
        try:
            for env, says in (({}, "gloo uses eth0 on host-"), ({"GLOO_SOCKET_IFNAME": "eth0"}, "")):
                run_dir = self.new_dir()
                ends = self.forked((1, 1), run_dir, **env)
                if problem := self.problem(ends, run_dir, num_ranks=2, says=says):
                    return problem
            hosts[0].must("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "veth1")
            hosts[0].must("ip", "address", "add", "10.1.0.1/24", "dev", "eth1")
            for name in ("eth1", "veth1"):
                hosts[0].must("ip", "link", "set", name, "up")
            says = "the name of host-1 has a loopback address there"
            return self.refused(
                (1, 1), self.new_dir(), [says, "GLOO_SOCKET_IFNAME"], each=True, MASTER_ADDR=hosts[0].name
            )
        finally:
            for host in hosts:
                host.must("umount", "/etc/hosts")
            hosts[0].run("ip", "link", "delete", "eth1")

    def lost_memory(self) -> str:
        """Lose the first host of three, with its memory, and go on on the others from what they have in theirs."""
        run_dir = self.new_dir()
        options = ("--replicate-every", "2", "--max-steps", "10", "--save-every", "0", "--async-save", "off")
        killed = self.forked((1, 2, 1), run_dir, *options, KILLED_AT="7", PACE_S="0.01")
        if not all(ended.status for ended in killed):
            return all_of(killed)
        ends = self.forked((0, 2, 1), run_dir, *options)
        if any(ended.status for ended in ends) or "brought back step 6 from memory" not in ends[0].out:
            return all_of(ends)
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
            return all_of(ends)
        again = self.forked((1,), run_dir, *options)
        if again[0].status:
            return all_of(again)
        return self.difference(run_dir, steps=30)


def cases(campaign: Campaign) -> dict[str, Callable[[], str]]:
    """Return the cases by name; each returns what is wrong."""
    static = ("--nnodes=3", "--master-addr=10.0.0.1", "--master-port=29500")
    ranks = (1, 2, 1)
    torchrun = TORCHRUN[: TORCHRUN.index("--standalone")]
    found: dict[str, Callable[[], str]] = {}
    for config in CONFIGS:
        found[f"multi_node/{config.name}, 2 hosts"] = lambda config=config: campaign.configured(config)
    for config in CONFIGS:
        if config.stem in ("ddp", "hsdp"):
            found[f"multi_node/{config.name} as it is, 2 hosts x 8"] = lambda config=config: campaign.configured(
                config, as_it_is=True
            )
    for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
        found[f"{strategy}, 1 + 2 ranks"] = lambda strategy=strategy: campaign.uneven(strategy, 1, 2)
        found[f"{strategy}, 1 + 2 + 1 ranks"] = lambda strategy=strategy: campaign.uneven(strategy, 1, 2, 1)
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
    with tempfile.TemporaryDirectory(prefix="shardlaunch-hosts-") as name, hosts_of(ADDRESSES) as hosts:
        os.environ["HF_HOME"] = str(Path(name) / "hf")  # the libraries read it before they are forked
        return run_cases(cases(Campaign(Path(name), hosts, Path(name) / "hf")), only, say)


if __name__ == "__main__":
    main_of_cases(__doc__, run, why_not)

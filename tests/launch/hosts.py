"""Hosts that are namespaces of this machine: each has a network, a name and mounts of its own; a switch joins them."""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.ranks import FORKING
from tests.launch.command import Ended, Forked, run_script

PROGRAMS = ("ip", "nsenter", "unshare", "mount")
NAMESPACES = ("uts", "net", "mnt")
SWITCH = "switch"
PORT = 29500  # nobody else is on these networks
# What is done below, in one go: it fails where the kernel or a container forbids it.
_TRIAL = """
hostname a && mount --bind /etc/hosts /etc/hosts && ip link add switch type bridge &&
ip link add one type veth peer name other && ip link set one master switch
"""


def why_not() -> str:
    """Return why no hosts can be made here, or an empty string."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (in Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    tried = subprocess.run(
        ["unshare", "-n", "-u", "-m", "sh", "-c", _TRIAL], capture_output=True, text=True, check=False
    )
    return f"namespaces are not allowed: {' '.join(tried.stderr.split())}" if tried.returncode else ""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host, which lives as long as a process that does nothing else."""

    name: str
    address: str
    pid: int

    def words(self, words: Sequence[str]) -> list[str]:
        """Return a command line that runs another on this host, in the same folder."""
        return ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "--wd=.", *words]

    def run(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on this host until it ends."""
        done: Any = subprocess.run(
            self.words(words), **{"capture_output": True, "text": True, "timeout": 300, "check": False, **more}
        )
        assert isinstance(done, subprocess.CompletedProcess)
        return done

    def must(self, *words: str) -> None:
        """Run a command on this host, which must go well."""
        done = self.run(*words)
        assert done.returncode == 0, f"{self.name}: {words}: {done.stderr}"

    def mount(self, folder: Path, target: Path, *, read_only: bool = False) -> None:
        """Show this host, and no other, a folder at another path, where there must be one."""
        self.must("mount", "--bind", str(folder), str(target))
        if read_only:
            self.must("mount", "-o", "remount,bind,ro", str(target))

    def set_link(self, state: str) -> None:
        """Set the cable of this host `up` or `down`."""
        self.must("ip", "link", "set", "eth0", state)

    def enter(self) -> None:
        """Move this process, which has one thread, to this host."""
        folder, libc = os.getcwd(), ctypes.CDLL(None, use_errno=True)
        for name in NAMESPACES:
            descriptor = os.open(f"/proc/{self.pid}/ns/{name}", os.O_RDONLY)
            if libc.setns(descriptor, 0):
                raise OSError(ctypes.get_errno(), f"cannot enter the {name} namespace of {self.name}")
            os.close(descriptor)
        os.chdir(folder)


@contextmanager
def hosts_of(addresses: Mapping[str, str]) -> Iterator[list[Host]]:
    """Start hosts of these names and addresses (of one /24), which reach each other by both; end them at the end."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "hosts"
        file.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
        switch = _started(stack, SWITCH, "", file)
        switch.must("ip", "link", "add", SWITCH, "type", "bridge")
        switch.must("ip", "link", "set", SWITCH, "up")
        hosts = []
        for number, (name, address) in enumerate(addresses.items()):
            host = _started(stack, name, address, file)
            port = f"port{number}"
            peer = ("peer", "name", "eth0", "netns", str(host.pid))
            switch.must("ip", "link", "add", port, "type", "veth", *peer)
            switch.must("ip", "link", "set", port, "master", SWITCH, "up")
            for words in (("address", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "lo", "up")):
                host.must("ip", *words)
            host.set_link("up")
            hosts.append(host)
        yield hosts


def _started(stack: ExitStack, name: str, address: str, file: Path) -> Host:
    """Start the process of a host."""
    setup = f"hostname {name} && mount --bind {file} /etc/hosts && echo ready && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "-n", "-u", "-m", "sh", "-c", setup], stdout=subprocess.PIPE, text=True)
    stack.callback(end_process, holder)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    return Host(name=name, address=address, pid=holder.pid)


def end_process(process: "subprocess.Popen[str]") -> None:
    """End a process that was started here, and its children."""
    children = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def forked_on(
    layout: Sequence[tuple[Host, int]], words: Sequence[str], env: Mapping[str, str]
) -> Iterator[list[Forked]]:
    """Start a Python script, as `tests.launch.command.forked` does, on so many ranks of each host.

    Yields the ranks of each host with their output. They are killed at the end.
    """
    size = sum(num_ranks for _, num_ranks in layout)
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": layout[0][0].address, "MASTER_PORT": str(PORT)}
    with ExitStack() as stack:
        found: list[Forked] = []
        first = 0
        for host, num_ranks in layout:
            places = [
                {"RANK": str(first + local), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(num_ranks)}
                for local in range(num_ranks)
            ]
            found.append(stack.enter_context(forked_at(host, words, [{**shared, **env, **place} for place in places])))
            first += num_ranks
        yield found


@contextmanager
def forked_at(host: Host, words: Sequence[str], envs: Sequence[Mapping[str, str]]) -> Iterator[Forked]:
    """Start a Python script on a host, once in each environment. All are killed at the end."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        run = Forked(ranks=[], out=Path(name) / "out", err=Path(name) / "err")
        run.out.touch(), run.err.touch()
        for env in envs:
            process = FORKING.Process(target=_run_at, args=(host, list(words[1:]), env, run.out, run.err))
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)  # does nothing to one that has ended
            run.ranks.append(process)
        yield run


def ends_on(layout: Sequence[tuple[Host, int]], words: Sequence[str], env: Mapping[str, str]) -> list[Ended]:
    """Run a Python script on hosts until it ends, and return how it ended on each."""
    with forked_on(layout, words, env) as runs:
        return [run.end() for run in runs]


def _run_at(host: Host, script: list[str], env: Mapping[str, str], out: Path, err: Path) -> None:
    host.enter()
    run_script(script, env, out, err)

"""A Slurm cluster of two machines on this one: network and host names of their own, the files in common."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "nsenter", "unshare")
STARTS_WITHIN_S = 60
LINK = "sl-campaign"
CONF = """
ClusterName=campaign
SlurmctldHost=n1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=3600
NodeName=n[1-2] CPUs=8 Gres=gpu:2
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n[1-2] PriorityTier=2
"""
GRES = "NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n"
HOSTS = "127.0.0.1 localhost\n10.71.0.1 n1\n10.71.0.2 n2\n"


def why_not() -> str:
    """Return why no cluster can be started here, or an empty string."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (in Debian: slurmctld, slurmd, slurm-client, munge, iproute2)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    return ""


class Cluster:
    """Runs commands on the machines n1 and n2."""

    def __init__(self, folder: Path, machines: Sequence[int], env: Mapping[str, str]) -> None:
        """`machines` are the processes whose namespaces are those of n1 and n2."""
        self.folder = folder
        self._machines = machines
        self._env = {**env, "SLURM_CONF": str(folder / "slurm.conf")}

    def words(self, words: Sequence[str], *, machine: int = 1) -> list[str]:
        """Return a command line that runs another on a machine."""
        return ["nsenter", "-t", str(self._machines[machine - 1]), "-n", "-u", "-m", "--wd=.", *words]

    def run(self, *words: str, machine: int = 1, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine until it ends."""
        done: Any = subprocess.run(
            self.words(words, machine=machine),
            env=self._env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **more,
        )
        assert isinstance(done, subprocess.CompletedProcess)
        return done

    def start(self, *words: str, machine: int = 1, **more: Any) -> subprocess.Popen[str]:
        """Start a command on a machine."""
        return subprocess.Popen(self.words(words, machine=machine), env=self._env, cwd=self.folder, text=True, **more)

    def state(self, job: int) -> dict[str, str]:
        """Return what scontrol says about a job."""
        shown = self.run("scontrol", "show", "job", str(job), "--oneliner").stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for(self, job: int, *states: str, within_s: float = 180) -> dict[str, str]:
        """Wait until a job has one of the states, and return what scontrol says then."""
        end = time.monotonic() + within_s
        while (state := self.state(job)).get("JobState") not in states:
            assert time.monotonic() < end, f"job {job} is not {' or '.join(states)} but {state}"
            time.sleep(0.3)
        return state


@contextmanager
def slurm_cluster(folder: Path, env: Mapping[str, str]) -> Iterator[Cluster]:
    """Start a cluster whose files are in `folder`; stop all its processes at the end. Commands run under `env`."""
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder))
    (folder / "gres.conf").write_text(GRES.format(folder=folder))
    for name in ("gpu0", "gpu1"):  # Slurm hands out what exists
        (folder / name).touch()
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "hosts").write_text(HOSTS)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    with ExitStack() as stack:
        machines = [_machine(stack, index, folder) for index in (1, 2)]
        _run(
            "ip",
            "link",
            "add",
            f"{LINK}1",
            "netns",
            str(machines[0]),
            "type",
            "veth",
            "peer",
            "name",
            f"{LINK}2",
            "netns",
            str(machines[1]),
        )
        cluster = Cluster(folder, machines, env)
        for index in (1, 2):
            for words in (
                ("ip", "link", "set", "lo", "up"),
                ("ip", "address", "add", f"10.71.0.{index}/24", "dev", f"{LINK}{index}"),
                ("ip", "link", "set", f"{LINK}{index}", "up"),
            ):
                done = cluster.run(*words, machine=index)
                assert done.returncode == 0, done.stderr
        munge = (
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        )
        _daemon(stack, cluster, folder / "munged.out", *munge)
        _daemon(stack, cluster, folder / "slurmctld.log", "slurmctld", "-D", "-c")
        for index in (1, 2):
            _daemon(stack, cluster, folder / f"slurmd{index}.log", "slurmd", "-D", "-N", f"n{index}", machine=index)
        end = time.monotonic() + STARTS_WITHIN_S
        while (states := cluster.run("sinfo", "--noheader", "--partition=low", "--format=%t %D").stdout.split()) != [
            "idle",
            "2",
        ]:
            assert time.monotonic() < end, f"the cluster does not start: {states}; see the logs in {folder}"
            time.sleep(0.5)
        yield cluster


def _machine(stack: ExitStack, index: int, folder: Path) -> int:
    """Start a process with namespaces of its own, and return its number."""
    setup = f"hostname n{index} && mount --bind {folder}/hosts /etc/hosts && echo ready && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "-n", "-u", "-m", "sh", "-c", setup], stdout=subprocess.PIPE, text=True)
    stack.callback(_end, holder)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    return holder.pid


def _daemon(stack: ExitStack, cluster: Cluster, log: Path, *words: str, machine: int = 1) -> None:
    with open(log, "w") as file:
        process = cluster.start(
            *words, machine=machine, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    stack.callback(_end, process)


def _end(process: "subprocess.Popen[str]") -> None:
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


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"

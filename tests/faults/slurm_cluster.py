"""A Slurm cluster of two machines on this one: network and host names of their own, the files in common."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.launch.hosts import Host, end_process, hosts_of
from tests.launch.hosts import why_not as no_hosts

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
STARTS_WITHIN_S = 60
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
MACHINES = {"n1": "10.71.0.1", "n2": "10.71.0.2"}


def why_not() -> str:
    """Return why no cluster can be started here, or an empty string."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (in Debian: slurmctld, slurmd, slurm-client, munge)"
    return no_hosts()


class Cluster:
    """Runs commands on the machines n1 and n2."""

    def __init__(self, folder: Path, machines: Sequence[Host], env: Mapping[str, str]) -> None:
        self.folder = folder
        self._machines = machines
        self._env = {**env, "SLURM_CONF": str(folder / "slurm.conf")}

    def words(self, words: Sequence[str], *, machine: int = 1) -> list[str]:
        """Return a command line that runs another on a machine."""
        return self._machines[machine - 1].words(words)

    def run(self, *words: str, machine: int = 1, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine until it ends."""
        return self._machines[machine - 1].run(*words, env=self._env, cwd=self.folder, **more)

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
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    with ExitStack() as stack:
        cluster = Cluster(folder, stack.enter_context(hosts_of(MACHINES)), env)
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


def _daemon(stack: ExitStack, cluster: Cluster, log: Path, *words: str, machine: int = 1) -> None:
    with open(log, "w") as file:
        process = cluster.start(
            *words, machine=machine, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    stack.callback(end_process, process)

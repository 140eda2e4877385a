"""What the variables of each launcher say: torchrun's, MPI's, LSF's, Slurm's, Kubernetes'."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from zlib import crc32

import psutil

from shardlaunch.errors import UserError

# Below the ports that the system hands out by itself, and above those that services have.
_FIRST_PORT, _NUM_PORTS = 15000, 17000
_PORTS_PER_JOB = 101  # steps of one job, before they share ports with the next job's
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # numbers that Slurm gives to batch scripts and interactive shells
_LOOPBACK = "127.0.0.1"
_ONE_MACHINE = "all are on one machine"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those that a launcher has started."""

    key: str  # its name in SHARDLAUNCH_LAUNCHER
    launcher: str  # in words
    rank: int
    size: int
    rank_variable: str
    size_variable: str
    local_rank: int | None = None
    local_size: int | None = None
    host: str = ""  # where rank 0 runs
    host_source: str = ""
    port: int | None = None

    @property
    def named_ranks(self) -> str:
        """Return the variables that say which rank this is."""
        return f"{self.rank_variable}={self.rank} and {self.size_variable}={self.size}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of the variables of one kind of launcher; of several names, the first that is set counts."""

    key: str
    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


FAMILIES = (
    Family(
        key="openmpi",
        launcher="mpirun (Open MPI)",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Family(
        key="mvapich",
        launcher="mpirun (MVAPICH)",
        rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE",
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Family(
        key="pals",
        launcher="mpiexec (PALS)",
        rank="PALS_RANKID",
        size="PMI_SIZE",
        local_rank=("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        local_size=("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    ),
    Family(
        key="pmi",
        launcher="mpiexec (PMI)",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    Family(
        key="jsrun",
        launcher="jsrun (LSF)",
        rank="JSM_NAMESPACE_RANK",
        size="JSM_NAMESPACE_SIZE",
        local_rank=("JSM_NAMESPACE_LOCAL_RANK",),
        local_size=("JSM_NAMESPACE_LOCAL_SIZE",),
    ),
)
# The same on all ranks of one mpirun, and another for the next.
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_orte_ess_jobid", "OMPI_MCA_ess_base_jobid", "PALS_APID", "PMI_JOBID")
_BATCH_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


def number(env: Mapping[str, str], name: str) -> int | None:
    """Return the value of a variable, None if it is unset or empty. Raises UserError if it is no whole number."""
    text = env.get(name, "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name}={text!r} is not a whole number") from None


def has_agent(env: Mapping[str, str]) -> bool:
    """Return whether torch's agent has started this process: torchrun, accelerate launch or shardlaunch run."""
    return "TORCHELASTIC_RUN_ID" in env


def by_variables(env: Mapping[str, str]) -> Launch | None:
    """Read what torchrun sets, and whoever does as torchrun."""
    empty = [name for name in ("RANK", "WORLD_SIZE") if env.get(name) == ""]
    if empty:
        raise UserError(f"{empty[0]} is set to nothing: set a number, or for one process unset RANK and WORLD_SIZE")
    rank, size = number(env, "RANK"), number(env, "WORLD_SIZE")
    if size is not None and size < 1:
        raise UserError(f"environment variable WORLD_SIZE={size} must be at least 1; change or unset it")
    if rank is None or size is None:
        return None
    launcher = "RANK and WORLD_SIZE"
    if has_agent(env):
        launcher = "torchrun"
        if "ACCELERATE_MIXED_PRECISION" in env:
            launcher = "accelerate launch"
        if "SHARDLAUNCH_PROGRESS_FILE" in env:
            launcher = "shardlaunch run"
    elif "KUBERNETES_SERVICE_HOST" in env:
        launcher = "RANK and WORLD_SIZE (Kubernetes)"
    per_pod = env.get("PET_NPROC_PER_NODE", "1")
    if not has_agent(env) and size > 1 and per_pod != "1" and "LOCAL_RANK" not in env:
        raise UserError(
            f"PET_NPROC_PER_NODE={per_pod} asks for several ranks per machine, which torchrun starts, but this process "
            f"was started by python: use `torchrun RECIPE`, which reads the PET_ variables, or unset PET_NPROC_PER_NODE"
        )
    return Launch(
        key="variables",
        launcher=launcher,
        rank=rank,
        size=size,
        rank_variable="RANK",
        size_variable="WORLD_SIZE",
        local_rank=number(env, "LOCAL_RANK"),
        local_size=number(env, "LOCAL_WORLD_SIZE"),
    )


def by_family(family: Family, env: Mapping[str, str]) -> Launch | None:
    rank, size = number(env, family.rank), number(env, family.size)
    if rank is None or size is None:
        return None
    local_sizes = [number(env, name) for name in family.local_size if name in env]
    local_ranks = [number(env, name) for name in family.local_rank if name in env]
    local_size = local_sizes[0] if local_sizes else None
    jobs = [env[name] for name in (*_MPI_JOBS, *_BATCH_JOBS) if env.get(name)]
    host, source = _first_host(env, of_step=False)  # steps may be of mpirun's helpers, without its own machine
    if local_size == size:
        host, source = _LOOPBACK, _ONE_MACHINE
        jobs = jobs or [_starter()]
    return Launch(
        key=family.key,
        launcher=family.launcher,
        rank=rank,
        size=size,
        rank_variable=family.rank,
        size_variable=family.size,
        local_rank=local_ranks[0] if local_ranks else None,
        local_size=local_size,
        host=host,
        host_source=source,
        port=_FIRST_PORT + crc32("/".join(jobs[:1]).encode()) % _NUM_PORTS,
    )


def by_slurm(env: Mapping[str, str]) -> tuple[Launch | None, str]:
    """Read what srun sets for each task; other processes of a job, such as a batch script, are single ones.

    Also returns a warning for a process that could be meant to be one of several.
    """
    job, step = number(env, "SLURM_JOB_ID") or number(env, "SLURM_JOBID"), _slurm_step(env)
    if job is None:
        return None, ""
    task, size = slurm_task(env), _num_tasks(env)
    if task is None:
        num_nodes = number(env, "SLURM_JOB_NUM_NODES") or number(env, "SLURM_NNODES") or 1
        if max(size, num_nodes) == 1:
            return None, ""
        tasks = f"{size} tasks" if size > 1 else f"{num_nodes} machines"
        return None, (
            f"Slurm job {job} has {tasks}, but srun did not start this process: it trains alone. "
            f"For one rank per task, use `srun python RECIPE`"
        )
    if size > 1 and _has_terminal() and not _is_task():  # of all tasks of srun --pty, the first has one
        return None, (
            f"this shell is one of {size} tasks of Slurm step {job}.{step} (srun --pty): what it starts trains alone. "
            f"For one rank per task, use `srun python RECIPE` in an allocation of salloc"
        )
    host, source = _first_host(env, of_step=True)
    if (number(env, "SLURM_STEP_NUM_NODES") or number(env, "SLURM_NNODES")) == 1:
        host, source = _LOOPBACK, _ONE_MACHINE
    return Launch(
        key="slurm",
        launcher=f"srun (Slurm step {job}.{step})",
        rank=task[0],
        size=size,
        rank_variable="SLURM_PROCID",
        size_variable="SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS",
        local_rank=number(env, "SLURM_LOCALID"),
        local_size=_tasks_of_node(env),
        host=host,
        host_source=source,
        port=_FIRST_PORT + (job * _PORTS_PER_JOB + step) % _NUM_PORTS,
    ), ""


def _slurm_step(env: Mapping[str, str]) -> int:
    steps = [number(env, name) for name in ("SLURM_STEP_ID", "SLURM_STEPID")]
    return next((step for step in steps if step is not None), _FIRST_SPECIAL_STEP)


def slurm_task(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the number of this task of srun, and of how many; None in a batch script, or a shell of salloc."""
    rank = number(env, "SLURM_PROCID")
    if rank is None or _slurm_step(env) >= _FIRST_SPECIAL_STEP:
        return None
    return rank, _num_tasks(env)


def _num_tasks(env: Mapping[str, str]) -> int:
    """Return the number of tasks of a Slurm step, or else of its job."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    return next((count for count in (number(env, name) for name in names) if count), 1)


def _tasks_of_node(env: Mapping[str, str]) -> int | None:
    """Return the number of tasks on this machine, from lists such as 2(x3),1."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = number(env, "SLURM_NODEID")
    if node is not None and node < len(counts):
        return counts[node]
    return counts[0] if len(set(counts)) == 1 else None


def by_kubernetes(env: Mapping[str, str]) -> Launch | None:
    """Read the index of a pod in an indexed Job, of which WORLD_SIZE is to be set to the number of pods."""
    rank, size = number(env, "JOB_COMPLETION_INDEX"), number(env, "WORLD_SIZE")
    if rank is None or size is None or size == 1 or "RANK" in env:
        return None
    return Launch(
        key="kubernetes",
        launcher="an indexed Job of Kubernetes",
        rank=rank,
        size=size,
        rank_variable="JOB_COMPLETION_INDEX",
        size_variable="WORLD_SIZE",
    )


def _first_host(env: Mapping[str, str], *, of_step: bool) -> tuple[str, str]:
    """Return the first machine of a batch job, where launchers start rank 0, and the variable that names it."""
    for name in (*(["SLURM_STEP_NODELIST"] if of_step else []), "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if env.get(name) and env.get("SLURM_DISTRIBUTION") != "arbitrary":
            return first_of_nodelist(env[name]), f"the first machine of {name}"
    if path := env.get("PBS_NODEFILE"):
        with suppress(OSError, UnicodeDecodeError), open(path) as file:
            return file.readline().strip(), "the first machine of PBS_NODEFILE"
    words = env.get("LSB_MCPU_HOSTS", "").split()
    hosts = list(zip(words[::2], words[1::2], strict=False))
    if len(hosts) > 1 and hosts[0][1] == "1":  # the machine of the batch script, which has no ranks
        hosts = hosts[1:]
    return (hosts[0][0], "the first machine of LSB_MCPU_HOSTS") if hosts else ("", "")


def first_of_nodelist(text: str) -> str:
    """Return the first machine of a list in Slurm's notation, such as gpu[01-04,7]-[1-2],login."""
    text = re.sub(r"\[(\d+)[^\]]*\]", r"\1", text)
    return text.partition(",")[0].strip()


def _has_terminal() -> bool:
    """Return whether this process belongs to a terminal, wherever its input comes from."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _is_task() -> bool:
    """Return whether Slurm started this very process, and no shell that it started."""
    parent = psutil.Process().parent()
    return parent is not None and parent.name().startswith("slurmstepd")


def _starter() -> str:
    """Return the process that started this process's session: MPICH has one per mpirun, and a session per rank."""
    with suppress(psutil.Error, OSError):
        return str(psutil.Process(os.getsid(0)).ppid())
    return ""

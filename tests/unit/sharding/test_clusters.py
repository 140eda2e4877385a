"""What launchers and clusters set is read as they document it, and contradictions are refused."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from shardlaunch.errors import UserError
from shardlaunch.sharding import launchers
from shardlaunch.sharding.clusters import apparent_rank
from shardlaunch.sharding.environment import (
    LaunchEnvironment,
    end_of_job,
    is_distributed_launch,
    one_of_several_launchers,
    read_environment,
)
from shardlaunch.sharding.launchers import first_of_nodelist

Variables = Mapping[str, str]

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
# A batch script is task 0 of a step without a number.
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASK = {
    **JOB,
    "SLURM_STEP_ID": "1",
    "SLURM_STEPID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
AGENT = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "5",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-gpu07-12@1",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
PALS = {
    "PALS_RANKID": "5",
    "PALS_LOCAL_RANKID": "1",
    "PALS_APID": "a1b2",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "4",
    "MASTER_ADDR": "x1000",
}
JSRUN = {
    "JSM_NAMESPACE_RANK": "6",
    "JSM_NAMESPACE_SIZE": "12",
    "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_LOCAL_SIZE": "6",
    "LSB_JOBID": "99",
    "LSB_MCPU_HOSTS": "batch1 1 h01 42 h02 42",
}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "RANK": "1",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "train-master-0",
    "MASTER_PORT": "23456",
}


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_has_terminal", lambda: False)


def expect(env: LaunchEnvironment, **fields: Any) -> None:
    """Assert the values of fields."""
    assert {name: getattr(env, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("variables", "ranks", "local", "address", "words"),
    [
        (TASK, (3, 4), (1, 2), "gpu07", "srun (Slurm step 4711.1)"),
        # A step of fewer tasks, on other machines, than the job.
        (
            {
                **TASK,
                "SLURM_STEP_NUM_TASKS": "3",
                "SLURM_PROCID": "2",
                "SLURM_STEP_NODELIST": "gpu08,login",
                "SLURM_STEP_TASKS_PER_NODE": "2,1",
                "SLURM_LOCALID": "0",
            },
            (2, 3),
            (0, 1),
            "gpu08",
            "srun",
        ),
        ({**TASK, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4"}, (3, 4), (1, 4), "127.0.0.1", "srun"),
        ({**TASK, "MASTER_ADDR": "ib07"}, (3, 4), (1, 2), "ib07", "srun"),
        # As scripts for other trainers have it.
        ({**TASK, "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07"}, (3, 4), (1, 2), "gpu07", "srun"),
        ({**TASK, "RANK": "3", "WORLD_SIZE": "4"}, (3, 4), (1, 2), "gpu07", "RANK and WORLD_SIZE"),
        ({**TASK, "SLURM_JOB_NAME": "interactive"}, (3, 4), (1, 2), "gpu07", "srun"),  # srun in a shell of salloc
        # srun --mpi=pmi2 in a step that does not begin on the job's first machine.
        (
            {**TASK, "PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_STEP_NODELIST": "gpu[08-09]"},
            (3, 4),
            (1, 2),
            "gpu08",
            "srun",
        ),
        ({**TASK, **AGENT}, (5, 16), (5, 8), "gpu07", "torchrun"),
        (
            {**TASK, **AGENT, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            (1, 2),
            (1, 2),
            "gpu07",
            "torchrun",
        ),
        ({**BATCH, **AGENT}, (5, 16), (5, 8), "gpu07", "torchrun"),
        ({**AGENT, "ACCELERATE_MIXED_PRECISION": "no"}, (5, 16), (5, 8), "gpu07", "accelerate launch"),
        ({**AGENT, "SHARDLAUNCH_PROGRESS_FILE": "f"}, (5, 16), (5, 8), "gpu07", "shardlaunch run"),
        ({**OPENMPI, "MASTER_ADDR": "h"}, (2, 4), (0, 2), "h", "mpirun (Open MPI)"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (2, 4), (0, 4), "127.0.0.1", "mpirun (Open MPI)"),
        ({**BATCH, **OPENMPI}, (2, 4), (0, 2), "gpu07", "mpirun (Open MPI)"),
        ({**BATCH, **OPENMPI, "OMPI_COMM_WORLD_RANK": "0"}, (0, 4), (0, 2), "gpu07", "mpirun (Open MPI)"),
        ({**BATCH, **PMI, "PMI_RANK": "0", "PMI_SIZE": "4"}, (0, 4), (1, 2), "gpu07", "mpiexec (PMI)"),
        # mpirun starts its helpers as tasks of a step, one on each of the other machines.
        (
            {**TASK, **OPENMPI, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu08"},
            (2, 4),
            (0, 2),
            "gpu07",
            "mpirun (Open MPI)",
        ),
        (PMI, (1, 2), (1, 2), "127.0.0.1", "mpiexec (PMI)"),
        (MVAPICH, (1, 2), (1, 2), "127.0.0.1", "mpirun (MVAPICH)"),
        (PALS, (5, 8), (1, 4), "x1000", "mpiexec (PALS)"),
        (JSRUN, (6, 12), (0, 6), "h01", "jsrun (LSF)"),
        ({**JSRUN, "LSB_MCPU_HOSTS": "h01 42 h02 42"}, (6, 12), (0, 6), "h01", "jsrun (LSF)"),
        ({**POD, "LOCAL_RANK": "0"}, (1, 3), (0, 3), "train-master-0", "RANK and WORLD_SIZE (Kubernetes)"),
        (
            {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train", "MASTER_PORT": "29500"},
            (2, 4),
            (0, 4),
            "train-0.train",
            "an indexed Job of Kubernetes",
        ),
    ],
)
def test_ranks(variables: Variables, ranks: tuple[int, int], local: tuple[int, int], address: str, words: str) -> None:
    env = read_environment(variables)
    expect(env, rank=ranks[0], world_size=ranks[1], master_addr=address, warnings=(), is_distributed=True)
    expect(env, local_rank=local[0], local_world_size=local[1])
    assert env.launcher.startswith(words)
    has_agent = "TORCHELASTIC_RUN_ID" in variables
    expect(env, has_agent=has_agent, knows_neighbours=has_agent, is_found="RANK" not in variables)
    assert is_distributed_launch(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1 inside a job of four
        {**TASK, "SHARDLAUNCH_LAUNCHER": "none"},
        {**AGENT, "SHARDLAUNCH_LAUNCHER": "none"},
        {"JOB_COMPLETION_INDEX": "3"},  # each pod a run of its own
        {"LSB_JOBID": "99", "LSB_MCPU_HOSTS": "h01 4"},  # bsub alone starts one process
        {"WORLD_SIZE": "1"},
    ],
)
def test_one_process(variables: Variables) -> None:
    expect(read_environment(variables), rank=0, world_size=1, is_distributed=False, warnings=())


@pytest.mark.parametrize(
    ("variables", "has_terminal", "text"),
    [
        (BATCH, False, "Slurm job 4711 has 4 tasks, but srun did not start this process: it trains alone. "),
        (JOB, True, "Slurm job 4711 has 4 tasks, but srun"),  # a shell of salloc
        ({**JOB, "SLURM_NTASKS": "", "SLURM_NPROCS": ""}, True, "Slurm job 4711 has 2 machines, but srun"),
        # A shell of salloc that Slurm starts on the first machine, and a batch script, with their special numbers.
        ({**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFA)}, True, "Slurm job 4711 has 4 tasks, but srun"),
        ({**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFB)}, False, "Slurm job 4711 has 4 tasks, but srun"),
        ({**TASK, "SLURM_PROCID": "0"}, True, "this shell is one of 4 tasks of Slurm step 4711.1 (srun --pty)"),
        ({**TASK, "SLURM_PROCID": "0", "PMI_RANK": "0", "PMI_SIZE": "4"}, True, "this shell is one of 4 tasks"),
    ],
)
def test_what_is_left_over_is_said(
    variables: Variables, has_terminal: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "_has_terminal", lambda: has_terminal)
    env = read_environment(variables)
    expect(env, rank=0, world_size=1, is_distributed=False)
    assert len(env.warnings) == 1
    assert env.warnings[0].startswith(text)
    assert "`srun python RECIPE`" in env.warnings[0]


@pytest.mark.parametrize(
    ("variables", "texts"),
    [
        ({**TASK, "RANK": "0", "WORLD_SIZE": "1"}, ("RANK=0 and WORLD_SIZE=1", "SLURM_PROCID=3", "unset RANK and")),
        ({**TASK, "RANK": "0", "WORLD_SIZE": "4"}, ("RANK=0 and WORLD_SIZE=4", "SLURM_PROCID=3")),
        ({**TASK, "WORLD_SIZE": "8"}, ("WORLD_SIZE=8 and SLURM_STEP_NUM_TASKS=4", "unset WORLD_SIZE")),
        ({**TASK, "RANK": "0"}, ("RANK=0 and SLURM_PROCID=3", "unset RANK")),
        ({**TASK, **OPENMPI, "OMPI_COMM_WORLD_SIZE": "3"}, ("OMPI_COMM_WORLD_SIZE=3", "SLURM_STEP_NUM_TASKS=4")),
        ({**OPENMPI, "RANK": "0", "WORLD_SIZE": "1"}, ("WORLD_SIZE=1", "OMPI_COMM_WORLD_SIZE=4 (mpirun (Open MPI))")),
        ({**BATCH, "WORLD_SIZE": "4"}, ("WORLD_SIZE=4 is set, but no RANK", "with srun")),
        ({**POD, "PET_NPROC_PER_NODE": "8"}, ("PET_NPROC_PER_NODE=8", "torchrun RECIPE")),
        ({"PMI_RANK": "1"}, ("PMI_RANK=1 is set, but no PMI_SIZE",)),
        ({"SLURM_JOB_ID": "x"}, ("SLURM_JOB_ID='x' is not a whole number",)),
        ({"SHARDLAUNCH_LAUNCHER": "pbs"}, ("SHARDLAUNCH_LAUNCHER=pbs: unknown", "slurm")),
        ({"SHARDLAUNCH_LAUNCHER": "slurm"}, ("SHARDLAUNCH_LAUNCHER=slurm: its variables are not set",)),
        ({**TASK, "SLURM_PROCID": "4"}, ("SLURM_PROCID=4 and SLURM_STEP_NUM_TASKS=4 contradict",)),
    ],
)
def test_contradictions_are_refused(variables: Variables, texts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        read_environment(variables)
    for text in texts:
        assert text in str(refusal.value)


def test_a_contradiction_is_printed_by_one_rank() -> None:
    tasks = [{**TASK, "SLURM_PROCID": str(rank), "RANK": "0", "WORLD_SIZE": "1"} for rank in range(4)]
    assert [apparent_rank(task) for task in tasks] == [0, 1, 2, 3]


def test_a_contradiction_is_settled_by_choice() -> None:
    variables = {**TASK, "RANK": "0", "WORLD_SIZE": "1"}
    expect(read_environment({**variables, "SHARDLAUNCH_LAUNCHER": "slurm"}), rank=3, world_size=4)
    expect(read_environment({**variables, "SHARDLAUNCH_LAUNCHER": "variables"}), rank=0, world_size=1)


def test_a_launcher_per_task_is_said() -> None:
    assert "srun (Slurm step 4711.1) has started this launcher 4 times" in one_of_several_launchers(TASK)
    for variables in ({}, BATCH, {**TASK, "SLURM_STEP_NUM_TASKS": "1"}, {**TASK, "SHARDLAUNCH_LAUNCHER": "none"}, POD):
        assert one_of_several_launchers(variables) == ""


def test_ports_of_steps_and_jobs_differ() -> None:
    def port(**other: str) -> int | None:
        return read_environment({**TASK, **other}).master_port

    assert len({port(SLURM_PROCID=str(rank)) for rank in range(4)}) == 1
    ports = [port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for job in range(4711, 4721) for step in range(9)]
    assert len(set(ports)) == len(ports)
    assert all(port is not None and 1024 < port < 32768 for port in ports)
    assert port(MASTER_PORT="29500") == 29500
    of_mpi = {read_environment({**OPENMPI, "PMIX_NAMESPACE": f"{run}"}).master_port for run in range(5)}
    assert len(of_mpi) == 5


def test_end_of_the_job() -> None:
    later = str(int(time.time()) + 3600)
    assert end_of_job({"SLURM_JOB_END_TIME": later}) == (float(later), "")
    assert end_of_job({}) == (None, "")
    for value, text in (("1700000000", "is in the past"), ("Unknown", "is not a time in seconds")):
        end, problem = end_of_job({"SLURM_JOB_END_TIME": value})
        assert end is None
        assert f"SLURM_JOB_END_TIME={value} {text}" in problem


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("n1", "n1"),
        ("n[1-3]", "n1"),
        ("gpu[07-08,11]", "gpu07"),
        ("gpu[1,3-4]-ib,login", "gpu1-ib"),
        ("r[1-2]c[003-100]", "r1c003"),
        ("login,gpu[07-08]", "login"),
        ("n-1.cluster.org,n-2", "n-1.cluster.org"),
    ],
)
def test_first_of_a_nodelist(text: str, first: str) -> None:
    assert first_of_nodelist(text) == first

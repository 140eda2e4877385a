"""Ranks find each other by what Slurm and Kubernetes set, without torchrun, and what is left over is said."""

import contextlib
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.launch.command import PLAIN, PYTHON, Ended, environment, forked, forked_end_of
from tests.launch.test_meeting import free_port
from tests.recipes import training_lines

JOB = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost,n2"}


def ends_of(hf_home: Path, run_dir: Path, ranks: Sequence[Mapping[str, str]]) -> list[Ended]:
    """Run the ranks of one run, each in its own environment."""
    words = [*PYTHON, PLAIN, "--output-dir", str(run_dir)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(forked(words, environment(hf_home, env))) for env in ranks]
        return [run.end() for run in running]


def job_of_free_port() -> tuple[str, str]:
    """Return the number of a job, and the port of its first step, which is free."""
    for job in range(4711, 4811):
        port = 15000 + job * 101 % 17000
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("", port))
            return str(job), str(port)
    pytest.fail("no port is free")


@pytest.fixture(scope="module")
def alone(hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Return the run of a batch script that does not call srun, with the end of another job in its environment."""
    run_dir = tmp_path_factory.mktemp("alone") / "out"
    left_over = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_JOB_END_TIME": "1700000000", **JOB}
    words = [*PYTHON, PLAIN, "--output-dir", str(run_dir)]
    return run_dir, forked_end_of(words, environment(hf_home, left_over))


def test_a_batch_script_without_srun(alone: tuple[Path, Ended]) -> None:
    _, ended = alone
    assert ended.status == 0, ended.both
    said = " ".join(ended.out.split())
    assert "warning: Slurm job 12 has 2 tasks, but srun did not start this process: it trains alone." in said
    assert "warning: SLURM_JOB_END_TIME=1700000000 is in the past" in said
    assert "1 x CPU" in said


def test_srun(hf_home: Path, tmp_path: Path, alone: tuple[Path, Ended]) -> None:
    job, port = job_of_free_port()
    step = {**JOB, "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    tasks = [{**step, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
    ends = ends_of(hf_home, tmp_path / "out", tasks)
    assert [ended.status for ended in ends] == [0, 0], [ended.both for ended in ends]
    said = " ".join(ends[0].out.split())
    named = f"started by srun (Slurm step {job}.0): SLURM_PROCID=0 and SLURM_STEP_NUM_TASKS=2"
    assert f"{named}; the ranks meet at localhost:{port} (the first machine of SLURM_JOB_NODELIST)" in said
    assert "2 x CPU" in said
    assert ends[1].out == ""
    assert_same(tmp_path / "out", alone[0])


def test_one_rank_per_pod(hf_home: Path, tmp_path: Path, alone: tuple[Path, Ended]) -> None:
    """A PyTorchJob sets no LOCAL_RANK and no LOCAL_WORLD_SIZE."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    ends = ends_of(hf_home, tmp_path / "out", [{**shared, "RANK": str(rank)} for rank in range(2)])
    assert [ended.status for ended in ends] == [0, 0], [ended.both for ended in ends]
    assert re.search(r"2 x CPU", ends[0].out)
    assert_same(tmp_path / "out", alone[0])


def assert_same(run_dir: Path, other: Path) -> None:
    """Compare the losses of two runs."""
    mine, others = ([line["loss"] for line in training_lines(folder)] for folder in (run_dir, other))
    assert len(mine) > 1
    assert mine == pytest.approx(others, abs=1e-5)

"""A short form of the campaign in a real Slurm cluster; the whole of it: python -m tests.faults.slurm."""

import pytest

from tests.faults.slurm import run
from tests.faults.slurm_cluster import why_not


@pytest.mark.skipif(bool(why_not()), reason=f"no Slurm cluster can be started here: {why_not()}")
def test_ranks_of_srun() -> None:
    said: list[str] = []
    assert run("srun, 2 machines x 2 tasks", say=said.append) == 0, said

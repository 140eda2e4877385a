"""The sums that `shardlaunch doctor` measures, on two ranks."""

import os

from shardlaunch.launcher.commands.doctor.collectives import Timing, sum_on_ranks
from tests.distributed.ranks import free_port, run_on_ranks


def _measured(port: int) -> list[Timing]:
    return sum_on_ranks(int(os.environ["RANK"]), 2, port, use_cuda=False, sizes=(1024, 4096), measured_s=0.01)


def test_ranks_measure_the_same_sums() -> None:
    one, other = run_on_ranks(2, _measured, free_port())
    assert [timing.num_bytes for timing in one] == [1024, 4096]
    assert [timing.times for timing in one] == [timing.times for timing in other]
    assert all(timing.seconds > 0 for timing in one)

"""What is said of sums between ranks, and when there are none; tests/distributed/test_doctor.py measures some."""

from typing import Any

from shardlaunch.launcher.commands.doctor import collectives
from shardlaunch.launcher.commands.doctor.collectives import Timing, check_collectives
from tests.unit.launcher.commands.doctor.levels import fine, only, said


def test_a_rank_that_fails() -> None:
    timings, why = collectives.measure(ranks=1, use_cuda=False, code="raise SystemExit('no port')")
    assert (timings, why) == ([], "rank 0 failed: no port")


def test_a_rank_that_does_not_end() -> None:
    timings, why = collectives.measure(ranks=1, use_cuda=False, code="import time; time.sleep(60)", limit_s=0.2)
    assert (timings, why) == ([], "the ranks were not done after 0 s")


def of(*timings: Timing, why: str = "") -> Any:
    return lambda **words: (list(timings), why)


SMALL = Timing(num_bytes=1024, seconds=1e-4, times=200)
LARGE = Timing(num_bytes=32 * 2**20, seconds=32e-3, times=20)


def test_what_is_said_of_sums() -> None:
    findings, figures = check_collectives(ranks=2, use_cuda=False, num_parameters=8 * 2**20, measured=of(SMALL, LARGE))
    fine(findings)
    assert "1 KiB 100 us, 32 MiB 32.0 ms (1.0 GB/s)" in said(findings, "ok")
    assert "33.6 MB of gradients: about 32.1 ms" in said(findings, "ok")
    assert figures["library"] == "gloo"


def test_sums_that_fail_or_are_slow() -> None:
    findings, figures = check_collectives(ranks=2, use_cuda=True, num_parameters=0, measured=of(why="rank 1 failed: x"))
    only(findings, "problem", "cannot sum a tensor with NCCL: rank 1 failed: x")
    assert figures == {}
    slow = Timing(num_bytes=1024, seconds=0.02, times=3)
    findings, _ = check_collectives(ranks=8, use_cuda=False, num_parameters=0, measured=of(slow, LARGE))
    only(findings, "problem", "the smallest sum takes 20.0 ms")

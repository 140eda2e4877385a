"""What is said of sums between ranks, and when there are none."""

from typing import Any

from shardlaunch.launcher.commands.doctor import collectives
from shardlaunch.launcher.commands.doctor.collectives import Measured, Timing, check_collectives
from tests.unit.launcher.commands.doctor.levels import fine, only, said


def test_sums_between_two_ranks() -> None:
    found = collectives.measure(ranks=2, use_cuda=False, measured_s=0.01, limit_s=60)
    assert (found.why, [timing.num_bytes for timing in found.timings]) == ("", list(collectives.SIZES))
    assert all(timing.seconds > 0 and timing.times >= 3 for timing in found.timings)


def measured(code: str, *, limit_s: float = 20) -> Measured:
    return collectives.measure(ranks=2, use_cuda=False, code=code, limit_s=limit_s)


def test_ranks_that_fail() -> None:
    assert measured("raise SystemExit('no port')") == Measured(why="no port")
    assert measured("import os; os._exit(3)") == Measured(why="status 3")
    fails = "raise RuntimeError('[enforce fail at /build/gloo.cc:1] no device')"
    code = f"""
import json, os
from pathlib import Path
from shardlaunch.launcher.commands.doctor import collectives
def sum_on_ranks(*args, **words):
    {fails}
collectives.sum_on_ranks = sum_on_ranks
said = json.loads(os.environ[collectives._VARIABLE])
collectives._be_rank(1, said, Path(said["folder"]))
"""
    assert measured(code) == Measured(why="rank 1: RuntimeError: no device")


def test_ranks_that_do_not_end() -> None:
    assert measured("import time; time.sleep(60)", limit_s=0.2).is_busy
    code = f"""
import json, os, time
open(json.loads(os.environ["{collectives._VARIABLE}"])["folder"] + "/started", "w")
os.fork()
time.sleep(60)
"""
    assert measured(code, limit_s=2) == Measured(why="the ranks were not done after 2 s")


def of(*timings: Timing, **more: Any) -> Any:
    return lambda **words: Measured(timings=timings, **more)


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
    busy = of(why="torch was not loaded in 12 s", is_busy=True)
    only(check_collectives(ranks=8, use_cuda=False, num_parameters=0, measured=busy)[0], "note", "not measured: torch")
    slow = Timing(num_bytes=1024, seconds=0.02, times=3)
    findings, _ = check_collectives(ranks=8, use_cuda=False, num_parameters=0, measured=of(slow, LARGE))
    only(findings, "note", "the smallest sum takes 20.0 ms")

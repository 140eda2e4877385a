"""Whether a run has time for one more step, and to finish the one that it is in."""

import math

import pytest

from shardlaunch.launcher.training import time_left
from shardlaunch.launcher.training.time_left import TimeLeft


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock, which stands until it is set. The process has just begun."""
    now = [1000.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time_left, "_age_s", lambda: 0.0)
    return now


def test_stops_before_the_step_that_would_be_too_long(clock: list[float]) -> None:
    left = TimeLeft(max_time_s=100)
    left.step_took(10)
    left.save_took(20, 20)
    clock[0] = 1052.9  # 98 s, without half as much again of 10 + 20 s
    assert not left.is_over()
    clock[0] = 1053.1
    assert left.is_over()


def test_the_launch_may_have_begun_before(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_left, "_age_s", lambda: 97.0)
    left = TimeLeft(max_time_s=100)
    assert not left.is_over()
    clock[0] += 1.1
    assert left.is_over()


def test_the_end_of_the_job_is_the_default(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_left.time, "time", lambda: 5000.0)
    left = TimeLeft(job_ends_at=5100.0)
    assert left.end_source == "SLURM_JOB_END_TIME"
    clock[0] += 97.9
    assert not left.is_over()
    clock[0] += 0.2
    assert left.is_over()
    own = TimeLeft(max_time_s=200, job_ends_at=5100.0)
    assert (own.is_over(), own.end_source) == (False, "--max-time")


def test_a_slow_first_step_is_forgotten(clock: list[float]) -> None:
    left = TimeLeft(max_time_s=100)
    left.step_took(60)
    clock[0] += 20
    assert left.is_over()
    for _ in range(40):
        left.step_took(0.1)
    assert not left.is_over()


def test_no_limit(clock: list[float]) -> None:
    left = TimeLeft(grace_s=30)
    left.step_took(1e6)
    assert not left.is_over()
    assert not left.is_short(None)
    assert left.is_short(clock[0])


def test_the_rest_of_a_step_within_the_time_of_grace(clock: list[float]) -> None:
    left = TimeLeft(grace_s=30)
    left.assume_save_of(int(1e9))  # 10 s
    left.step_begins()
    assert left.is_short(clock[0]), "how long a first step takes is not known"
    left.step_took(20)
    left.step_begins()
    asked_at = clock[0] = clock[0] + 10
    assert left.is_short(asked_at), "half as much again: 20 s of the step, 15 s of the save"
    clock[0] += 8
    asked_at = clock[0]
    assert not left.is_short(asked_at), "12 s of the step, 15 s of the save"
    left.save_took(20, 20)
    assert left.is_short(asked_at)


def test_what_is_said_of_a_save() -> None:
    said: list[str] = []
    left = TimeLeft(grace_s=5, mtbf_s=86400, say=said.append, warn=said.append)
    left.assume_save_of(int(1e10))
    left.save_took(4, 4)
    assert said == [
        "saving about every 14 min: the training stands still for 4 s in a save, and one failure is expected per 24 h "
        "(--mtbf)"
    ]
    left.save_took(6, 6)
    assert len(said) == 2
    assert said[1].startswith("saving takes 6 s, longer than --grace-s 5: ")
    left.save_took(7, 7)
    assert len(said) == 2


def test_the_best_time_between_saves(clock: list[float]) -> None:
    """It is where the time lost is least: J. T. Daly's model, minimized numerically."""
    for save_s, mtbf_s in ((1, 86400), (30, 86400), (60, 3600), (600, 3600)):
        left = TimeLeft(mtbf_s=mtbf_s)
        left.save_took(save_s, save_s)

        def lost(interval_s: float, save_s: float = save_s, mtbf_s: float = mtbf_s) -> float:
            return math.expm1((interval_s + save_s) / mtbf_s) / interval_s

        best = min((mtbf_s * n / 100_000 for n in range(1, 100_000)), key=lost)
        assert left.save_interval_s == pytest.approx(best, rel=0.01)
        clock[0] += left.save_interval_s - 1e-3
        assert not left.is_save_due()
        clock[0] += 2e-3
        assert left.is_save_due()
        left.save_begins()
        left.save_took(save_s, save_s)
        assert not left.is_save_due()
    assert not TimeLeft().is_save_due()


def test_saves_beside_the_training(clock: list[float]) -> None:
    left = TimeLeft(max_time_s=100, mtbf_s=1000)
    left.save_begins()
    left.save_took(20, 0.1)
    assert left.save_interval_s == 20, "one ends before the next, though they cost little"
    clock[0] += 60  # 38 s are left, 30 s are enough for a save, and 60 s for two
    assert not left.is_over()
    left.save_begins()
    assert left.is_over(), "the next one waits for this one"

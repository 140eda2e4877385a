"""Each step is judged by its loss and gradient norm."""

import math
from typing import Any

import pytest

from shardlaunch import Options, UserError
from shardlaunch.launcher.training.bad_numbers import MOST_IN_A_ROW, Judge, RollBack

NAN, INF = math.nan, math.inf


def _judge(*, has_loss_scale: bool = False, **options: Any) -> Judge:
    return Judge(Options(**options), has_loss_scale=has_loss_scale)


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_what_is_not_finite(loss: float, norm: float) -> None:
    with pytest.raises(UserError, match=r"step 7: loss .*stopped before the update"):
        _judge().skips(7, loss, norm)
    assert _judge(on_nonfinite="skip").skips(7, loss, norm)
    with pytest.raises(RollBack, match="step 7: loss"):
        _judge(on_nonfinite="rollback").skips(7, loss, norm)


def test_an_overflow_of_scaled_gradients_is_left_to_the_loss_scale() -> None:
    judge = _judge(has_loss_scale=True)
    assert not judge.skips(1, 1.0, INF)
    with pytest.raises(UserError):
        judge.skips(2, NAN, 1.0)


def test_a_spike() -> None:
    judge = _judge(on_spike="skip")
    losses = [2.0 + 0.1 * (step % 5) for step in range(40)]  # median 2.2, deviation 0.1
    assert not any(judge.skips(step, loss, 1.0) for step, loss in enumerate(losses))
    assert not judge.skips(40, 2.2 + 10 * 1.4826 * 0.1 - 0.01, 1.0)
    assert judge.skips(41, 2.2 + 10 * 1.4826 * 0.1 + 0.01, 1.0)
    assert not judge.skips(42, 0.0, 1.0), "a small loss is none"


def test_nothing_is_a_spike_at_the_beginning_or_on_a_plateau() -> None:
    judge = _judge(on_spike="stop")
    assert not any(judge.skips(step, loss, 1.0) for step, loss in enumerate([9.0, 1.0, 1e6, *[3.0] * 40]))
    assert not judge.skips(50, 3.29, 1.0)
    with pytest.raises(UserError, match=r"step 51: loss 3.31 above 3.3; stopped .*--on-spike skip"):
        judge.skips(51, 3.31, 1.0)


def test_without_the_option_no_spike_is_looked_for() -> None:
    judge = _judge()
    assert not any(judge.skips(step, loss, 1.0) for step, loss in enumerate([1.0] * 40 + [1e30]))
    assert judge.recent == []


def test_a_restored_judge_judges_alike() -> None:
    judge, other = _judge(on_spike="skip"), _judge(on_spike="skip")
    for step in range(100):
        judge.skips(step, 1 + 0.01 * math.sin(step), 1.0)
    other.restore(judge.recent)
    for step, loss in enumerate([1.0, 1.2, 1.105, 1.11, 1.5, 1.0]):
        assert judge.skips(step, loss, 1.0) == other.skips(step, loss, 1.0)
    assert judge.recent == other.recent


def test_what_is_no_exception_ends_the_run() -> None:
    judge = _judge(on_nonfinite="skip")
    for start in (0, 100):
        for step in range(start, start + MOST_IN_A_ROW):
            assert judge.skips(step, NAN, 1.0)
        if not start:
            assert not judge.skips(99, 1.0, 1.0)
    with pytest.raises(UserError, match="20 steps before it were skipped already"):
        judge.skips(200, NAN, 1.0)

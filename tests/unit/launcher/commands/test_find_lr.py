"""Which rate a curve of losses suggests, and where it has diverged."""

import math
from itertools import pairwise

import numpy as np

from shardlaunch.launcher.commands.find_lr.curve import MARGIN, Curve, Request, suggest

REQUEST = Request(low=1e-6, high=10.0, steps=141)
LRS = [REQUEST.rate(step) for step in range(REQUEST.steps)]


def _losses(falls_at: float, rises_at: float, noise: float = 0.0) -> list[float]:
    """Return losses that fall fastest at one rate, by the logarithm, and rise from another one on."""
    generator = np.random.default_rng(0)
    return [
        2 - 1 / (1 + falls_at / lr) + (lr / rises_at) ** 2 + noise * float(generator.standard_normal()) for lr in LRS
    ]


def test_rates_rise_by_the_same_factor() -> None:
    assert math.isclose(LRS[0], 1e-6)
    assert LRS[-1] == 10.0
    factors = [after / before for before, after in pairwise(LRS)]
    assert np.allclose(factors, factors[0])


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    for noise in (0.0, 0.01):
        found = suggest(LRS, _losses(1e-3, 1.0, noise))
        assert found.lr is not None
        assert 0.4e-3 < found.lr < 2.5e-3
        assert found.lr == found.steepest_lr


def test_the_suggestion_keeps_a_margin_from_the_rate_with_the_lowest_loss() -> None:
    found = suggest(LRS, _losses(0.5, 0.5))
    assert found.lowest_lr is not None
    assert found.lr == found.lowest_lr / MARGIN


def test_nothing_is_suggested_where_the_loss_does_not_fall() -> None:
    assert suggest(LRS, [2.0] * len(LRS)).lr is None
    assert suggest(LRS, [2 + lr for lr in LRS]).lr is None
    assert suggest(LRS, [math.nan, *[1.0] * 140]).lr is None
    assert suggest(LRS, []).lr is None


def test_a_loss_diverges_when_it_is_far_above_the_lowest_one_or_not_finite() -> None:
    curve = Curve()
    for lr, loss in zip(LRS, _losses(1e-3, 0.2), strict=True):
        curve.add(lr, loss, is_skipped=False)
        if curve.has_diverged:
            break
    assert 0.2 < curve.lrs[-1] < 2
    curve = Curve()
    curve.add(1e-6, math.nan, is_skipped=True)
    assert curve.has_diverged
    assert curve.skipped == [0]

"""Mixtures of sources: shares that are exact at any place, weights that change at steps, sources that begin anew."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from shardlaunch import UserError, orders
from shardlaunch.launcher.training.mixing import MixedOrder, Shuffled, Stage, pattern_of

WEIGHTS = [
    ("0.7", "0.3"),
    ("1", "2"),
    ("1", "1", "1", "1", "1"),
    ("0.013", "0.5", "0.487"),
    ("3", "0", "1"),
    ("1e3", "7"),
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_right_at_every_place(weights: Sequence[str]) -> None:
    pattern = pattern_of(weights)
    length = len(pattern.sources)
    shares = np.array([float(Fraction(weight)) for weight in weights])
    expected = np.arange(length + 1) * shares[:, None] / shares.sum()
    assert np.abs(pattern.before - expected).max() < 1.0000001
    assert pattern.before[:, -1] == pytest.approx(expected[:, -1], abs=1e-9)


def test_patterns() -> None:
    assert pattern_of(["0.7", "0.3"]).sources.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert pattern_of([2, 1]).sources.tolist() == [0, 1, 0]
    rounded = pattern_of(["0.123456", "0.876544"])
    assert rounded.before[:, -1].tolist() == [1235, 8765]


@pytest.mark.parametrize(
    "weights", [[], ["-1", "2"], ["0", "0"], ["a", "1"], ["nan", "1"], ["inf", "1"], ["1e-9", "1"]]
)
def test_weights_that_are_none_are_refused(weights: list[str]) -> None:
    with pytest.raises(UserError, match="weight"):
        pattern_of(weights)


def _order(*stages: Stage) -> MixedOrder:
    return MixedOrder([Shuffled(30), orders.blockwise([4, 4, 4], window=4), Shuffled(50)], stages)


def test_sources_come_in_their_own_order_and_begin_anew() -> None:
    order = _order(Stage(0, ("2", "1", "1")), Stage(100, ("1", "1", "0")), Stage(150, ("0", "0", "1")))
    assert order.num_samples == 92
    whole = np.concatenate([order.samples(3, epoch, np.arange(92)) for epoch in range(3)])
    source = np.searchsorted([30, 42], whole, side="right")
    assert [np.bincount(part, minlength=3).tolist() for part in np.split(source, [100, 150])] == [
        [50, 25, 25],
        [25, 25, 0],
        [0, 0, 126],
    ]
    for number, size in enumerate((30, 12, 50)):
        mine = whole[source == number]
        passes = [mine[first : first + size].tolist() for first in range(0, len(mine), size)]
        assert all(len(set(one)) == len(one) for one in passes), "all of it before any of it again"
        assert passes[0] != passes[1]
    again = _order(*order.stages)
    at = np.array([91, 7, 60, 7])
    assert again.samples(3, 1, at).tolist() == whole[92 + at].tolist()


def test_the_digest_follows_weights_steps_and_sources() -> None:
    stages = [
        [Stage(0, ("2", "1", "1"))],
        [Stage(0, ("2", "1", "2"))],
        [Stage(0, ("2", "1", "1")), Stage(10, ("1", "1", "1"))],
        [Stage(0, ("2", "1", "1")), Stage(11, ("1", "1", "1"))],
    ]
    digests = {_order(*one).digest() for one in stages}
    assert len(digests) == 4
    assert _order(Stage(0, ("4", "2", "2.0"))).digest() in digests, "only the proportions matter"
    other = MixedOrder([Shuffled(31), orders.blockwise([4, 4, 4], window=4), Shuffled(50)], stages[0])
    assert other.digest() not in digests

"""The permutation without memory: a bijection of any size, and one that no statistic tells from chance."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from shardlaunch.launcher.training import permutation
from shardlaunch.launcher.training.permutation import Permutation

SMALL = [*range(1, 70), 97, 101, 127, 128, 129, 255, 256, 257, 509, 997, 1023, 1024, 1025]
LARGE = [8191, 8192, 8193, 65_535, 65_537, 99_991, 1_000_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
COUNT = 1500
MOST_DEVIATIONS = 5  # of some forty statistics; far less than a weak rule has (below)


def _whole(size: int, key: int) -> np.ndarray:
    return Permutation(size, key)(np.arange(size))


def _many(size: int, count: int) -> np.ndarray:
    """Return permutations of many keys: (count, size)."""
    return np.stack([_whole(size, key) for key in range(count)])


@pytest.mark.parametrize("size", [*SMALL, *LARGE])
def test_every_value_once(size: int) -> None:
    for key in range(3):
        assert np.array_equal(np.sort(_whole(size, key)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 8193, 1_000_000])
def test_parts_agree_with_the_whole(size: int) -> None:
    whole, permute = _whole(size, 7), Permutation(size, 7)
    for start, end in ((0, 1), (size // 3, size // 2), (size // 2, size), (size - 1, size)):
        assert np.array_equal(permute(np.arange(start, end)), whole[start:end])
    chosen = np.random.default_rng(0).integers(0, size, 100)
    assert np.array_equal(permute(chosen), whole[chosen])
    assert permute(np.arange(0)).shape == (0,)


@pytest.mark.parametrize("size", [10**9, (1 << 32) - 1, (1 << 32) + 1, 10**12 + 39, 1 << 62])
def test_sizes_that_no_memory_holds(size: int) -> None:
    permute = Permutation(size, 3)
    values = permute(np.concatenate((np.arange(50_000), np.arange(size - 50_000, size))))
    assert len(np.unique(values)) == 100_000
    assert 0 <= values.min() < size // 1000 < size - size // 1000 < values.max() < size


def test_values_are_those_of_the_first_release_with_them() -> None:
    """They are part of a run's identity: no version of numpy, and no processor, may change them."""
    assert _whole(10, 1).tolist() == [9, 1, 5, 6, 2, 3, 4, 0, 8, 7]
    assert Permutation(10**9, 1)(np.array([0, 1, 2, 123_456_789, 999_999_999])).tolist() == [
        827817645,
        224069265,
        690803765,
        91611014,
        228161299,
    ]


def _deviations(counts: np.ndarray, expected: float, *, freedom: int) -> float:
    """Return by how many standard deviations chi-square is above its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


def _all_deviations(size: int, found: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yield statistics of permutations (count, size), in standard deviations from those of chance."""
    count = len(found)
    cells = np.bincount((found + size * np.arange(size)).ravel(), minlength=size * size)
    yield "values by position", _deviations(cells, count / size, freedom=(size - 1) ** 2)
    steps = np.diff(found, axis=1) % size
    apart = np.bincount(steps.ravel(), minlength=size)[1:]
    yield "differences of neighbours", _deviations(apart, steps.size / (size - 1), freedom=size - 2)
    two = np.bincount(((found[:, 2:] - found[:, :-2]) % size).ravel(), minlength=size)[1:]
    yield "differences two apart", _deviations(two, count * (size - 2) / (size - 1), freedom=size - 2)
    between = np.bincount(((found[1:] - found[:-1]) % size).ravel(), minlength=size)
    yield "differences of keys", _deviations(between, (count - 1) * size / size, freedom=size - 1)
    centred = found - (size - 1) / 2
    variance = (size * size - 1) / 12
    serial = float((centred[:, 1:] * centred[:, :-1]).mean()) / variance + 1 / (size - 1)
    yield "serial correlation", abs(serial) * math.sqrt(count * size)
    across = float((centred[1:] * centred[:-1]).mean()) / variance
    yield "correlation of keys", abs(across) * math.sqrt(count * size)
    rises = (np.diff(found, axis=1) > 0).mean()
    yield "rises", abs(float(rises) - 0.5) * math.sqrt(12 * count * size)
    fixed = (found == np.arange(size)).sum(axis=1)
    yield "fixed points", abs(float(fixed.mean()) - 1) * math.sqrt(count)


@pytest.mark.parametrize("size", [10, 16, 17, 64, 97, 129])
def test_statistics_are_those_of_chance(size: int) -> None:
    found = dict(_all_deviations(size, _many(size, COUNT)))
    assert max(map(abs, found.values())) < MOST_DEVIATIONS, found


def test_every_permutation_of_four_is_as_frequent() -> None:
    found = _many(4, 24 * 100) @ 4 ** np.arange(4)
    counts = np.unique(found, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(_deviations(counts, 100, freedom=23)) < MOST_DEVIATIONS


def test_few_rounds_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "num_rounds", lambda size: 4)
    for size in (16, 129):
        found = dict(_all_deviations(size, _many(size, COUNT)))
        assert found["differences of neighbours"] > 20 * MOST_DEVIATIONS


@pytest.mark.parametrize("size", [60_000, 1_000_000])
def test_one_order_of_many_samples_is_as_by_chance(size: int) -> None:
    """Positions in a grid of 100 x 100, differences of neighbours in 1,000 classes, and runs of successive values."""
    for key in range(3):
        values = _whole(size, key)
        grid = np.bincount((np.arange(size) * 100 // size) * 100 + values * 100 // size, minlength=10_000)
        assert abs(_deviations(grid, size / 10_000, freedom=99**2)) < MOST_DEVIATIONS
        for apart in (1, 2, 64, 256, 1024):
            steps = (values[apart:] - values[:-apart]) % size * 1000 // size
            counts = np.bincount(steps, minlength=1000)
            assert abs(_deviations(counts, len(steps) / 1000, freedom=999)) < MOST_DEVIATIONS
            centred = values - (size - 1) / 2
            serial = (centred[apart:] * centred[:-apart]).mean() / centred.var()
            assert abs(serial) * math.sqrt(size) < MOST_DEVIATIONS
        assert (np.diff(values) == 1).sum() < 10, "one is expected"

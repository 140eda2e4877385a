"""The order of data that is read block by block: all of it in each epoch, few blocks at a time."""

import numpy as np
import pytest

from shardlaunch import UserError, orders

SIZES = np.array([3, 40, 1, 17, 25, 60, 9, 9, 9, 31])
BLOCK_OF = np.repeat(np.arange(len(SIZES)), SIZES)


def _all(order: orders.Order, epoch: int, seed: int = 5) -> np.ndarray:
    return order.samples(seed, epoch, np.arange(order.num_samples))


@pytest.mark.parametrize("window", [1, 30, 64, 1000])
def test_each_epoch_has_all_samples_and_any_part_of_it_is_known(window: int) -> None:
    order = orders.blockwise(SIZES, window=window)
    whole = _all(order, 1)
    assert sorted(whole.tolist()) == list(range(SIZES.sum()))
    assert not np.array_equal(whole, _all(order, 0))
    assert not np.array_equal(whole, _all(order, 1, seed=6))
    again = orders.blockwise(SIZES, window=window)
    for at in ([203, 7, 7, 99], range(60, 130)):
        assert again.samples(5, 1, np.array(at)).tolist() == whole[np.array(at)].tolist()


@pytest.mark.parametrize(("window", "span"), [(30, 1), (30, 50), (64, 1), (1, 1)])
def test_few_blocks_are_needed_at_a_time(window: int, span: int) -> None:
    order = orders.blockwise(SIZES, window=window)
    most = order.samples_at_once(span)
    for epoch in range(20):
        held: list[int] = []
        num_read = 0
        whole = _all(order, epoch)
        for first in range(0, len(whole), span):  # the samples of a span come in any order
            for block in np.sort(BLOCK_OF[whole[first : first + span]])[::-1].tolist():
                num_read += block not in held
                held = [*(other for other in held if other != block), block]
                while SIZES[held].sum() > most:
                    held.pop(0)
        assert num_read == len(SIZES), "each block is read once"


def test_blocks_are_mixed_within_windows() -> None:
    order = orders.blockwise(np.full(64, 32), window=256)
    assert order.blocks_per_window() == 8
    first = _all(order, 0)[:256] // 32
    counts = np.bincount(first, minlength=64)
    assert sorted(counts[counts > 0].tolist()) == [32] * 8
    assert np.abs(np.diff(first)).astype(bool).mean() > 0.8, "neighbours are of different blocks"
    assert _all(orders.blockwise(np.full(64, 32), window=1), 0)[:32].max() < 2048


def test_a_large_index_takes_memory_per_block_only() -> None:
    sizes = np.full(25_000, 4_000)
    order = orders.blockwise(sizes, window=1 << 14)
    assert order.num_samples == 10**8
    found = order.samples(0, 3, np.arange(10**8 - 5, 10**8))
    assert len(set(found.tolist())) == 5
    layout = order._layout(0, 3)
    arrays = (order._sizes, order._first_samples, layout.blocks, layout.starts, layout.windows)
    assert sum(array.nbytes for array in arrays) <= 40 * len(sizes)


@pytest.mark.parametrize("sizes", [[], [3, 0], [[1]], [1.5]])
def test_sizes_that_are_none_are_refused(sizes: list[float]) -> None:
    with pytest.raises(UserError, match="number of samples of each block"):
        orders.blockwise(sizes)


def test_the_digest_follows_sizes_and_window() -> None:
    digests = {orders.blockwise(SIZES, window=window).digest() for window in (30, 31)}  # type: ignore[attr-defined]
    assert len(digests | {orders.blockwise(SIZES[::-1], window=30).digest()}) == 3

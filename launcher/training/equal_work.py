"""Micro-batches of equal work, and ranks that get equal shares of it."""

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

# Attention takes as long as the rest of a layer at this length: measured with the demo's encoder (6 x 384) on a CPU.
# Wider models, and kernels on GPUs, have a higher one: what is balanced with this one is nearly so for them too.
_EQUAL_LENGTH = 1200
_HALVINGS = 25


def work_of(lengths: np.ndarray) -> Any:
    """Return the work of a sample that is padded to a length, in any unit: a linear and a quadratic part."""
    long = np.asarray(lengths, dtype=np.float64)
    return long * (1 + long / _EQUAL_LENGTH)


def shares(work: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Return which micro-batches each rank has, in ascending order: nearly equal work, as few on each as can be."""
    room = -(-len(work) // num_ranks)
    found: list[list[int]] = [[] for _ in range(num_ranks)]
    least = [(0.0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        done, rank = heapq.heappop(least)
        found[rank].append(index)
        if len(found[rank]) < room:
            heapq.heappush(least, (done + work[index], rank))
    return [sorted(each) for each in found]


def cuts(lengths: np.ndarray, num_parts: int) -> list[int]:
    """Return where to cut a batch with ascending lengths so that the part with the most work has the least.

    The first number is 0, the last one that of the samples; no part is empty.
    """
    each: list[float] = work_of(lengths).tolist()
    evenly = [len(each) * part // num_parts for part in range(num_parts + 1)]
    enough = max((end - begin) * each[end - 1] for begin, end in pairwise(evenly))
    too_little, best = 0.0, _filled(each, num_parts, enough)
    for _ in range(_HALVINGS):
        tried = (too_little + enough) / 2
        found = _filled(each, num_parts, tried)
        if found[-1] == len(each):
            enough, best = tried, found
        else:
            too_little = tried
    return best


def _filled(each: Sequence[float], num_parts: int, most: float) -> list[int]:
    """Return where parts end that have as many samples as `most` work allows; the last end is lower if it does not."""
    bounds = [0]
    for part in range(num_parts):
        begin = bounds[-1]
        low, high = begin, len(each) - (num_parts - 1 - part)
        while low < high:  # the last end with no more work than that
            middle = (low + high + 1) // 2
            low, high = (middle, high) if (middle - begin) * each[middle - 1] <= most else (low, middle - 1)
        bounds.append(low)
    return bounds


def composed(lengths: np.ndarray, batch_size: int, num_parts: int) -> np.ndarray:
    """Return global batches of short and long samples that can be cut into parts of equal work with little padding.

    `lengths` is ascending along its last dimension: (buckets, samples of whole batches). Each batch takes the shortest
    samples that are left for one half of its parts, and the longest ones for the other half, so many of each that a
    part has the same work. Returns positions: (buckets, batches, batch size), ascending in each batch.
    """
    num_buckets, size = lengths.shape
    if num_parts == 1:  # nothing to balance
        return np.broadcast_to(np.arange(size).reshape(-1, batch_size), (num_buckets, size // batch_size, batch_size))
    num_low = (num_parts + 1) // 2
    work = work_of(lengths)
    first, last = np.zeros(num_buckets, dtype=np.int64), np.full(num_buckets, size)
    found = []
    for _ in range(size // batch_size):
        short = _num_short(work, first, last, batch_size, num_low, num_parts - num_low)
        places = np.arange(batch_size)
        is_short = places < short[:, None]
        found.append(np.where(is_short, first[:, None] + places, (last - batch_size)[:, None] + places))
        first += short
        last -= batch_size - short
    return np.stack(found, axis=1)


def _num_short(
    work: np.ndarray, first: np.ndarray, last: np.ndarray, batch_size: int, num_low: int, num_high: int
) -> np.ndarray:
    """Return how many short samples a batch of each bucket has, so that the part with the most work has the least."""

    def most(begin: np.ndarray, count: np.ndarray, parts: int) -> np.ndarray:
        ends = count[:, None] * np.arange(parts + 1) // parts
        longest = np.take_along_axis(work, begin[:, None] + ends[:, 1:] - 1, axis=1)
        found: np.ndarray = np.max(np.diff(ends, axis=1) * longest, axis=1)
        return found

    def both(short: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        long = batch_size - short
        return most(first, short, num_low), most(last - long, long, num_high)

    low, high = np.full_like(first, num_low), np.full_like(first, batch_size - num_high)
    while np.any(low < high):  # the fewest with which the short ones have as much work as the long ones
        middle = (low + high) // 2
        of_short, of_long = both(middle)
        is_enough = of_short >= of_long
        low, high = np.where(is_enough, low, middle + 1), np.where(is_enough, middle, high)
    fewer = np.maximum(low - 1, num_low)
    return np.where(np.maximum(*both(fewer)) < np.maximum(*both(low)), fewer, low)

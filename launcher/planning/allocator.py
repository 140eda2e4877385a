"""What PyTorch's allocator takes from a GPU for a trace of allocations: blocks that are in use, and the gaps between.

The allocator keeps what is freed, for later blocks of the same stream. A block gets the smallest free one that is large
enough, of which the rest is cut off; neighbours that are free grow together again. What is in use decides whether a run
fits, since gaps are given back when memory is short; what is taken is what `nvidia-smi` shows.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

BLOCK_BYTES = 512  # sizes are rounded up to a multiple of it
_MIB = 1 << 20
_MOST_SMALL = _MIB
_SMALL_SEGMENT, _SEGMENT, _LEAST_LARGE, _LARGE_STEP = 2 * _MIB, 20 * _MIB, 10 * _MIB, 2 * _MIB
_APART = 1 << 50  # between the addresses of segments, which do not grow together


def in_blocks(num_bytes: int) -> int:
    """Return a size as the allocator rounds it up."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def reserved_bytes(
    events: Sequence[tuple[int, int]], streams: Mapping[int, int], *, is_expandable: bool = False
) -> int:
    """Return what the allocator has taken from the device at the end of a ledger's events.

    `streams`: those of storages that are not allocated in the default one. `is_expandable`: with
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
    """
    pools: dict[tuple[int, bool], _Pool] = {}
    held: dict[int, tuple[_Pool, int]] = {}
    sizes: dict[int, int] = {}
    for number, change in events:
        size = sizes[number] = sizes.get(number, 0) + change
        if number in held:
            pool, start = held.pop(number)
            pool.give_back(start)
        if size:
            is_small = in_blocks(size) <= _MOST_SMALL
            key = (streams.get(number, 0), is_small)
            pool = pools.setdefault(key, _Pool(is_small=is_small, is_expandable=is_expandable))
            held[number] = pool, pool.take(in_blocks(size))
    return sum(pool.num_bytes for pool in pools.values())


class _Pool:
    """What the allocator has for one stream's small or large blocks."""

    def __init__(self, *, is_small: bool, is_expandable: bool) -> None:
        self.num_bytes = 0
        self._is_small, self._is_expandable = is_small, is_expandable
        self._least_rest = BLOCK_BYTES if is_small or is_expandable else _MIB + BLOCK_BYTES
        self._end = 0
        self._taken: dict[int, int] = {}
        self._free: list[tuple[int, int]] = []
        """Sizes and starts, in their order."""
        self._sizes: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        """Of free blocks, by their ends."""

    def take(self, size: int) -> int:
        """Return the start of a block."""
        at = bisect_left(self._free, (size, -1))
        if self._is_expandable and at < len(self._free) and sum(self._free[at]) == self._end:
            at += 1  # the last is taken last, since it can grow
        start = self._free[at][1] if at < len(self._free) else self._grown(size)
        found = self._without(start)
        self._taken[start] = found
        if found - size >= self._least_rest:
            self._taken[start] = size
            self._add(start + size, found - size)
        return start

    def give_back(self, start: int) -> None:
        """Free a block."""
        size = self._taken.pop(start)
        if start in self._starts:
            before = self._starts[start]
            start, size = before, size + self._without(before)
        if start + size in self._sizes:
            size += self._without(start + size)
        self._add(start, size)

    def _grown(self, size: int) -> int:
        """Take memory from the device, and return the start of a free block that is large enough."""
        if self._is_expandable:
            step = _SMALL_SEGMENT if self._is_small else _SEGMENT
            start = self._starts.get(self._end, self._end)
            have = self._without(start) if start < self._end else 0
            more = max(0, -(-(size - have) // step) * step)
        else:
            start, have = self._end + _APART, 0
            more = -(-size // _LARGE_STEP) * _LARGE_STEP
            if size < _LEAST_LARGE:
                more = _SMALL_SEGMENT if self._is_small else _SEGMENT
        self._end = start + have + more
        self.num_bytes += more
        self._add(start, have + more)
        return start

    def _add(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._sizes[start] = size
        self._starts[start + size] = start

    def _without(self, start: int) -> int:
        size = self._sizes.pop(start)
        del self._starts[start + size]
        self._free.pop(bisect_left(self._free, (size, start)))
        return size

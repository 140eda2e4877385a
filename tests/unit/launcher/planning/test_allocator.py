"""The model of PyTorch's GPU allocator, by what is documented of it."""

from itertools import accumulate

import pytest
import torch

from shardlaunch.launcher.planning.allocator import in_blocks, reserved_bytes

KIB, MIB = 1 << 10, 1 << 20


def _reserved(*changes: tuple[int, float], streams: dict[int, int] | None = None, is_expandable: bool = False) -> float:
    """Return MiB that are reserved after changes of (storage, MiB)."""
    events = [(number, round(change * MIB)) for number, change in changes]
    return reserved_bytes(events, streams or {}, is_expandable=is_expandable) / MIB


@pytest.mark.parametrize(
    ("changes", "reserved", "expandable"),
    [
        ([(1, 1 / MIB)], 2, 2),
        ([(1, 0.6), (2, 0.6), (3, 0.6)], 2, 2),
        ([(1, 0.6), (2, 0.6), (3, 0.9)], 4, 4),
        ([(1, 5), (2, 15)], 20, 20),
        ([(1, 11)], 12, 20),
        ([(1, 800), (1, -800), (2, 900)], 1700, 900),
        ([(1, 800), (1, -800), (1, 800)], 800, 800),  # resized to nothing, and back
        ([(1, 100), (1, -100), (2, 60), (3, 100)], 200, 160),  # the gap behind the second is too small
        ([(1, 100), (1, -100), (2, 60), (3, 30), (4, 20)], 120, 120),
        ([(1, 100), (1, -100), (2, 50), (3, 50), (2, -50), (3, -50), (4, 100)], 100, 100),  # neighbours grow together
        ([(1, 100), (1, -100), (2, 50), (3, 50), (2, -50), (4, 51)], 152, 160),
        ([(1, 100), (2, 40), (3, 100), (1, -100), (3, -100), (4, 30), (5, 100)], 240, 240),
        ([(1, 100), (1, -100), (2, 99.5), (2, -99.5), (3, 100)], 100, 100),
        ([(1, 0.5), (1, -0.5), (2, 30)], 32, 42),  # small blocks have segments of their own
    ],
)
def test_reserved(changes: list[tuple[int, float]], reserved: float, expandable: float) -> None:
    assert _reserved(*changes) == reserved
    assert _reserved(*changes, is_expandable=True) == expandable


def test_streams_share_nothing() -> None:
    changes = [(1, 100), (1, -100), (2, 100)]
    assert _reserved(*changes) == 100
    assert _reserved(*changes, streams={2: 7}) == 200
    assert _reserved(*changes, streams={1: 7, 2: 7}, is_expandable=True) == 100


@pytest.mark.parametrize("is_expandable", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_never_less_than_is_in_use(seed: int, is_expandable: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    events, held = [], {}
    for number in range(400):
        size = in_blocks(1 + drawn(8 * KIB << drawn(14)))
        events.append((number, size))
        held[number] = size
        if drawn(5) < 2 * len(held) // 10:
            gone = list(held)[drawn(len(held))]
            events.append((gone, -held.pop(gone)))
    in_use = max(accumulate(change for _, change in events))
    reserved = reserved_bytes(events, {}, is_expandable=is_expandable)
    assert reserved >= in_use

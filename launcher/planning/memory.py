"""What a trace of allocations says: what stays, what is kept for the backward pass, the peak."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardlaunch.launcher.planning.allocator import in_blocks, reserved_bytes
from shardlaunch.launcher.planning.simulation import GRADIENTS, INPUTS, OPTIMIZER, PARAMETERS, Trace

ON_HOST = (PARAMETERS, GRADIENTS, OPTIMIZER)
"""What --cpu-offload keeps in host memory."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept between the forward and the backward pass of a micro-batch, with what is gathered at that moment."""
    peak: int
    """The most of the device's memory at once; what is in host memory is not in it."""
    peak_in: str
    """The part of a step that it is reached in."""
    reserved: int
    """What PyTorch's allocator takes from the device for it: with gaps, which it gives back when memory is short."""
    host: int = 0
    """Of the above, what is in host memory."""


def memory_of(trace: Trace, *, is_offloaded: bool = False) -> Memory:
    """Return the memory that a trace shows."""
    numbers, changes = _rounded(trace.events)
    kinds = np.array([trace.kinds.get(int(number), "") for number in numbers], dtype=object)
    on_host = np.isin(kinds, ON_HOST) if is_offloaded else np.zeros(len(kinds), dtype=bool)
    on_device = [event for event, is_on_host in zip(trace.events, on_host, strict=True) if not is_on_host]
    begin = next(mark.position for mark in trace.marks if mark.name == "begin")
    live = np.cumsum(np.where(on_host, 0, changes))
    peak_at = begin + int(np.argmax(live[begin:])) if len(live) > begin else len(live) - 1
    most = {kind: int(np.cumsum(np.where(kinds == kind, changes, 0)).max(initial=0)) for kind in ON_HOST}
    passing = np.cumsum(np.where(np.isin(kinds, (*ON_HOST, INPUTS)), 0, changes))
    ends = [mark.position - 1 for mark in trace.marks if mark.name == "forward"]
    peak_in = next((mark.name for mark in trace.marks if mark.position > peak_at), "update")
    return Memory(
        parameters=most[PARAMETERS],
        gradients=most[GRADIENTS],
        optimizer=most[OPTIMIZER],
        activations=int(max(passing[ends], default=0)),
        peak=int(live[peak_at]),
        peak_in=peak_in,
        reserved=reserved_bytes(on_device, trace.streams),
        host=int(np.cumsum(np.where(on_host, changes, 0)).max(initial=0)),
    )


def peak_of(events: Sequence[tuple[int, int]]) -> int:
    """Return the most bytes that are in use at once."""
    return int(np.cumsum(_rounded(events)[1]).max(initial=0))


def _rounded(events: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the storages' numbers and changes of size, each size rounded up as the allocator does."""
    sizes: dict[int, int] = {}
    changes = []
    for number, change in events:
        before = sizes.get(number, 0)
        sizes[number] = before + change
        changes.append(in_blocks(before + change) - in_blocks(before))
    return np.array([number for number, _ in events], dtype=np.int64), np.array(changes, dtype=np.int64)

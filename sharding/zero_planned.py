"""DeepSpeed as rank 0 of thousands of ranks, on tensors without values: what a plan runs.

DeepSpeed makes lists of views with one for each rank, of which a rank uses its own. Without values the others only take
time. What is here in place of them allocates, computes and sends the same (`tests/distributed/test_plan.py`).
"""

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shardlaunch.sharding.world import World
from shardlaunch.sharding.zero import imported_deepspeed


@contextmanager
def views_of_rank_0(world: World, *, block_bytes: int) -> Iterator[None]:
    """Let DeepSpeed make views for rank 0 alone. `block_bytes`: what the sizes of allocations are rounded up to."""
    with imported_deepspeed(world):
        from deepspeed.runtime.comm import coalesced_collectives
        from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2

    optimizer = stage_1_and_2.DeepSpeedZeroOptimizer
    average, flatten = optimizer.average_tensor, stage_1_and_2._flatten_dense_tensors
    reduce_scatter = coalesced_collectives._torch_reduce_scatter_fn

    def average_tensor(zero: Any, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        average(zero, _Range(tensor, 0, tensor.numel()), dtype)

    def flatten_dense_tensors(tensors: Sequence[Any]) -> torch.Tensor:
        flat: torch.Tensor = flatten(tensors) if not isinstance(tensors[0], _Range) else _joined(tensors)
        return flat

    def reduce_scatter_coalesced(tensors: list[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
        return _reduce_scatter(tensors, group, reduce_scatter, block_bytes)

    with ExitStack() as stack:
        for owner, name, replacement in (
            (optimizer, "average_tensor", average_tensor),
            (optimizer, "get_data_parallel_partitions", _own_partition),
            (stage_1_and_2, "_flatten_dense_tensors", flatten_dense_tensors),
            (stage_1_and_2, "_unflatten_dense_tensors", _ranges_of),
            (stage3, "reduce_scatter_coalesced", reduce_scatter_coalesced),
            (partition_parameters.AllGatherCoalescedHandle, "wait", _wait),
            # Loops of this module are over ranks.
            (partition_parameters, "range", lambda count: builtins.range(min(count, 1))),
        ):
            stack.enter_context(_replaced(owner, name, replacement))
        yield


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@dataclass(frozen=True)
class _Range:
    """A range of a flat tensor, of which no view is made."""

    tensor: torch.Tensor
    start: int
    length: int

    def numel(self) -> int:
        return self.length

    def narrow(self, _: int, start: int, length: int) -> "_Range":
        return _Range(self.tensor, self.start + start, length)

    def copy_(self, _: "_Range") -> None:
        """Allocate nothing."""


def _joined(ranges: Sequence[_Range]) -> torch.Tensor:
    """Return the concatenation of ranges, as torch does: of one alone, a view."""
    first = ranges[0]
    if len(ranges) == 1:
        return first.tensor.view(-1).narrow(0, first.start, first.length)
    return first.tensor.new_empty(sum(each.length for each in ranges))


def _ranges_of(flat: torch.Tensor, parts: Sequence[Any]) -> Sequence[Any]:
    """Return the parts of a concatenation."""
    if not isinstance(parts[0], _Range):
        return torch._utils._unflatten_dense_tensors(flat, parts)  # type: ignore[no-any-return]
    whole, start, found = _Range(flat, 0, flat.numel()), 0, []
    for part in parts:
        found.append(whole.narrow(0, start, part.length))
        start += part.length
    return found


def _own_partition(zero: Any, tensor: torch.Tensor, group_id: int) -> list[torch.Tensor]:
    size = -(-tensor.numel() // dist.get_world_size(group=zero.real_dp_process_group[group_id]))
    return [tensor.narrow(0, 0, size)]


def _reduce_scatter(
    tensors: list[torch.Tensor], group: Any, reduce_scatter: Callable[..., Any], block_bytes: int
) -> list[torch.Tensor]:
    """Reduce gradients of which each rank gets a range of each, with padding that is allocated for each rank."""
    num_ranks = dist.get_world_size(group)
    sizes = [-(-tensor.numel() // num_ranks) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % num_ranks == 0:
        padding, flat = [], tensors[0].view(-1)
    else:
        padding = [_padding(tensor, size, num_ranks, block_bytes) for tensor, size in zip(tensors, sizes, strict=True)]
        flat = tensors[0].new_empty(num_ranks * sum(sizes))
    flat.div_(num_ranks)
    own = flat.narrow(0, 0, sum(sizes))
    reduce_scatter(flat, own, group=group)
    del padding
    return list(own.split(sizes))


def _padding(tensor: torch.Tensor, size: int, num_ranks: int, block_bytes: int) -> torch.Tensor:
    """Return as much memory as the padding behind a tensor takes, which is allocated for each rank that needs some."""
    num_full = tensor.numel() // size
    rest = tensor.numel() % size
    num_blocks = sum(
        count * -(-length * tensor.element_size() // block_bytes)
        for length, count in ((size, num_ranks - num_full - bool(rest)), (size - rest, bool(rest)))
    )
    return tensor.new_empty(num_blocks * block_bytes, dtype=torch.uint8)


def _wait(handle: Any, handle_dependency: bool = True) -> None:
    """Give each parameter of a handle memory of its own, which the gathered ranges are copied to."""
    if handle.complete:
        return
    handle.allgather_handle.wait()
    for parameter in handle.params:
        parameter.data = handle.partitions[0].new_empty(parameter.ds_numel).view(parameter.ds_shape)
        parameter.ds_status = type(parameter.ds_status).AVAILABLE
    handle.complete = True

"""FSDP2's collectives on gloo, with messages from rank to rank.

Gloo sums everything on all ranks in order to give each its part, and copies what it gathers: with few ranks it is much
faster to send each part where it belongs and to add there, in the order of the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

MOST_RANKS = 8
"""In a group: each rank keeps a connection to every other."""


def fits(group: dist.ProcessGroup) -> bool:
    """Return whether the ranks of a group may send each other messages."""
    return dist.get_backend(group) == "gloo" and 1 < group.size() <= MOST_RANKS


def exchange(parts: Sequence[torch.Tensor], received: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Send each other rank of `group` its part, and receive one from each. All ranks of it; own places are not used."""
    rank, size = dist.get_rank(group), group.size()
    works = []
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        works.append(dist.irecv(received[source], group=group, group_src=source))
        works.append(dist.isend(parts[target], group=group, group_dst=target))
    for work in works:
        assert work is not None
        work.wait()


def parts_of_all(values: torch.Tensor, group: dist.ProcessGroup, memory: torch.Tensor) -> list[torch.Tensor]:
    """Return what each rank of `group` has at this rank's place in flat `values`. All ranks of it.

    `memory` is as large as `values`; what it held is overwritten.
    """
    parts, received = values.chunk(group.size()), list(memory.chunk(group.size()))
    exchange(parts, received, group)
    own = dist.get_rank(group)
    received[own] = parts[own]
    return received


class OwnMemory:
    """Gives FSDP2's collectives memory that nothing else uses."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an empty tensor."""
        return torch.empty(*size, dtype=dtype, device=device)


class DirectReduction(OwnMemory, ReduceScatter):
    """A sum of the gradients of a block."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        first, second, *others = parts_of_all(input_tensor, group, torch.empty_like(input_tensor))
        torch.add(first, second, out=output_tensor)
        for part in others:
            output_tensor.add_(part)


class DirectGather(OwnMemory, AllGather):
    """The whole weights of a block."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        whole = list(output_tensor.chunk(group.size()))
        exchange([input_tensor] * group.size(), whole, group)
        own = whole[dist.get_rank(group)]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)

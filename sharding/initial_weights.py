"""The weights at the start of a run, for sharded strategies: one rank per machine has them all, each takes its shards.

So a machine needs memory for one full model while a run starts, whatever its number of ranks.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.checkpoints.state import MODEL, ONLY, Replica, TensorSpec
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.world import World


class InitialWeights:
    """A `StateReader` of the weights that the first rank of each machine holds.

    `model` has the names and shapes, on every rank; `whole` has the values, on the first rank of each machine. Reading
    is collective: all ranks of a machine read the same tensors in the same order, each its own range.
    """

    def __init__(self, model: nn.Module, whole: nn.Module | None, *, world: World) -> None:
        self._world = world
        self._specs = [
            TensorSpec(name=name, section=MODEL, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in _weights(model).items()
        ]
        self._values = {name: tensor.detach() for name, tensor in _weights(whole).items()} if whole is not None else {}

    def specs(self) -> Iterable[TensorSpec]:
        """Return every weight and persistent buffer."""
        return self._specs

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int, replica: Replica = ONLY) -> torch.Tensor:
        """Return elements [flat_start, flat_end): a flat CPU tensor. All ranks of the machine."""
        leader, *others = self._world.local_ranks
        group = self._world.host_group
        if self._world.rank == leader:
            flat = self._values[spec.name].reshape(-1)
            for other in others:
                wanted = torch.empty(2, dtype=torch.int64)
                dist.recv(wanted, other, group=group)
                start, end = wanted.tolist()
                if end > start:
                    dist.send(flat[start:end].contiguous(), other, group=group)
            return flat[flat_start:flat_end]
        dist.send(torch.tensor([flat_start, flat_end]), leader, group=group)
        shard = torch.empty(flat_end - flat_start, dtype=spec.dtype)
        if len(shard):
            dist.recv(shard, leader, group=group)
        return shard


def _weights(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return dict(model.named_parameters()) | persistent_buffers(model)

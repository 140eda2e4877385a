"""The weights at the start of a run, for sharded strategies: each rank reads its shards, or gets them of another.

What is in files, each rank reads itself, only its own range. All else the first rank of a machine makes, one tensor at
a time, and sends the ranges. So no rank needs memory for more than its shards and one tensor.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.checkpoints.state import MODEL, ONLY, Replica, TensorSpec
from shardlaunch.checkpoints.stored import Place
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES, DTYPES, TensorEntry
from shardlaunch.progress import progress
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.world import World


class Values(Protocol):
    """The values of a model's weights and persistent buffers by name."""

    @property
    def places(self) -> Mapping[str, Place]:
        """Where those are that are in files."""

    def value(self, name: str) -> torch.Tensor:
        """Return one of the others, on the CPU."""


class InitialWeights:
    """A `StateReader` of the weights that the first rank of each machine has, or knows the files of.

    `model` has the names and shapes, on every rank; `values` is there on the first rank of each machine. Reading is
    collective: all ranks of a machine read the same tensors in the same order, each its own range.
    """

    def __init__(self, model: nn.Module, values: Values | None, *, world: World) -> None:
        """All ranks of a machine."""
        self._world = world
        self._specs = [
            TensorSpec(name=name, section=MODEL, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in _weights(model).items()
        ]
        self._values = values
        self._places = self._shared_places()

    def specs(self) -> Iterable[TensorSpec]:
        """Return every weight and persistent buffer."""
        return self._specs

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int, replica: Replica = ONLY) -> torch.Tensor:
        """Return elements [flat_start, flat_end): a flat CPU tensor. All ranks of the machine."""
        progress.advance()
        place = self._places.get(spec.name)
        if place is not None:
            return place.read(flat_start, flat_end).to(spec.dtype)
        leader, *others = self._world.local_ranks
        group = self._world.host_group
        if self._values is not None:
            flat = self._values.value(spec.name).to(spec.dtype).reshape(-1)
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

    def _shared_places(self) -> Mapping[str, Place]:
        """Return the places that the first rank of this machine knows. All ranks of the machine."""
        leader, *others = self._world.local_ranks
        group = self._world.host_group
        if self._values is not None:
            data = msgspec.json.encode({name: _record(place) for name, place in self._values.places.items()})
            for other in others:
                dist.send(torch.tensor(len(data)), other, group=group)
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), other, group=group)
            return self._values.places
        length = torch.empty((), dtype=torch.int64)
        dist.recv(length, leader, group=group)
        text = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(text, leader, group=group)
        return {name: _place(*record) for name, record in msgspec.json.decode(text.numpy().data).items()}


def _record(place: Place) -> tuple[str, str, tuple[int, ...], int]:
    return str(place.path), DTYPE_NAMES[place.entry.dtype], place.entry.shape, place.entry.offset


def _place(path: str, dtype: str, shape: Iterable[int], offset: int) -> Place:
    return Place(path=Path(path), entry=TensorEntry(shape=tuple(shape), dtype=DTYPES[dtype], offset=offset))


def _weights(model: nn.Module) -> Mapping[str, Any]:
    return dict(model.named_parameters()) | persistent_buffers(model)

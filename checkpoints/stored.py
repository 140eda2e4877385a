"""Tensors that stay in their files until some of their elements are read."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from shardlaunch.checkpoints.tensorfile import TensorEntry, read_range


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor is: a file, and its shape, dtype and offset in it."""

    path: Path
    entry: TensorEntry

    def read(self, flat_start: int, flat_end: int) -> torch.Tensor:
        """Return elements [flat_start, flat_end): a flat CPU tensor of the stored dtype. Reads nothing else."""
        return read_range(self.path, self.entry, flat_start, flat_end)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensors(MutableMapping[str, torch.Tensor]):
    """Tensors by name, most of them in files: a whole tensor is read each time that it is asked for."""

    places: dict[str, Place]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Those that are in no file as they are meant."""
    dtype: torch.dtype | None = None
    """Of what is returned, if it holds floating-point numbers; None: as stored."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.places:
            return self.tensors[name]
        entry = self.places[name].entry
        tensor = self.places[name].read(0, prod(entry.shape)).reshape(entry.shape)
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.places.pop(name, None)
        self.tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del (self.places if name in self.places else self.tensors)[name]

    def __or__(self, others: Mapping[str, torch.Tensor]) -> "StoredTensors":
        both = self.renamed(lambda name: name)
        both.update(others)
        return both

    def renamed(self, rename: Callable[[str], str]) -> "StoredTensors":
        """Return the same tensors by other names, without reading any."""
        places = {rename(name): place for name, place in self.places.items()}
        tensors = {rename(name): tensor for name, tensor in self.tensors.items()}
        return StoredTensors(places=places, tensors=tensors, dtype=self.dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self.places
        yield from self.tensors

    def __len__(self) -> int:
        return len(self.places) + len(self.tensors)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name, without reading those that are in files."""
    places = tensors.places if isinstance(tensors, StoredTensors) else {}
    return {name: tuple(places[name].entry.shape if name in places else tensors[name].shape) for name in tensors}

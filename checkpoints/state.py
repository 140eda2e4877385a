"""The state type that strategies and checkpoints share: fragments of named tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from shardlaunch.checkpoints.listing import tensor_key
from shardlaunch.checkpoints.names import EMA as EMA
from shardlaunch.checkpoints.names import MODEL as MODEL
from shardlaunch.checkpoints.names import OPTIMIZER as OPTIMIZER
from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, section, shape and dtype of one whole tensor of a run's state.

    `name` is that of a parameter or buffer. `entry` is which of a section's tensors for that name: exp_avg, step, ...
    in the optimizer section; empty in the others.
    """

    name: str
    section: str
    entry: str = ""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * BYTES_PER_ELEMENT[self.dtype]

    @cached_property
    def key(self) -> str:
        """Return the tensor's name in its file: `name` in the model section, `entry/name` in all others."""
        return tensor_key(self.name, self.section, self.entry)


class Replica(NamedTuple):
    """One of several equal fragments, each on another rank."""

    number: int
    num_replicas: int


ONLY = Replica(0, 1)
"""The replica of a range that no other rank holds."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The flat range [flat_start, flat_end) of one tensor of the state, as held by this rank.

    `tensor` has flat_end - flat_start elements, of any shape, on any device.
    """

    spec: TensorSpec
    flat_start: int
    flat_end: int
    tensor: torch.Tensor
    replica: Replica | None = None
    """Which one this is of the equal fragments of several ranks; None: every rank holds this range."""


def whole(name: str, tensor: torch.Tensor, *, section: str = MODEL, entry: str = "") -> Fragment:
    """Return all of `tensor`, which every rank holds, as a fragment."""
    tensor = tensor.detach()
    spec = TensorSpec(name=name, section=section, entry=entry, shape=tuple(tensor.shape), dtype=tensor.dtype)
    return Fragment(spec=spec, flat_start=0, flat_end=spec.num_elements, tensor=tensor)


class StateReader(Protocol):
    """Access to saved state by name. A restore reads only the ranges that its rank holds.

    What is read is verified: a part of a tensor together with the parts that other ranks read. So of each replica the
    ranks read all parts, or none.
    """

    def specs(self) -> Iterable[TensorSpec]: ...

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int, replica: Replica = ONLY) -> torch.Tensor: ...


@runtime_checkable
class FillingReader(StateReader, Protocol):
    """A reader that can read into memory which is there."""

    def read_into(self, spec: TensorSpec, flat_start: int, target: torch.Tensor, replica: Replica = ONLY) -> None: ...


def fill(reader: StateReader, spec: TensorSpec, flat_start: int, target: torch.Tensor, replica: Replica = ONLY) -> None:
    """Read the elements from `flat_start` on into a tensor of any shape, without a copy in between where possible."""
    is_plain = target.device.type == "cpu" and target.is_contiguous() and target.dtype == spec.dtype
    if is_plain and isinstance(reader, FillingReader):
        reader.read_into(spec, flat_start, target, replica)
    else:
        target.copy_(reader.read(spec, flat_start, flat_start + target.numel(), replica).view(target.shape))


def specs_by_section(specs: Iterable[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """Return the tensors of each section; sections and tensors in the order given."""
    sections: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        sections.setdefault(spec.section, []).append(spec)
    return sections


def checked(fragments: Iterable[Fragment]) -> list[Fragment]:
    """Return the fragments. Raises AssertionError for a tensor that is there twice, or a fragment of another size."""
    found: dict[str, Fragment] = {}
    for fragment in fragments:
        key = fragment.spec.key
        assert fragment.tensor.numel() == fragment.flat_end - fragment.flat_start, key
        assert key not in found, f"{key} is in the state twice"
        found[key] = fragment
    return list(found.values())

"""The state type that strategies and checkpoints share: fragments of named tensors."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from shardlaunch.checkpoints.listing import tensor_key
from shardlaunch.checkpoints.names import MODEL as MODEL
from shardlaunch.checkpoints.names import OPTIMIZER as OPTIMIZER
from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, section, shape and dtype of one whole tensor of a run's state.

    `name` is that of a parameter or buffer. `entry` is which of a section's tensors for that name: exp_avg, step, ...
    in the optimizer section; empty in the model section.
    """

    name: str
    section: str
    entry: str = ""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * BYTES_PER_ELEMENT[self.dtype]

    @property
    def key(self) -> str:
        """Return the tensor's name in its file: `name` in the model section, `entry/name` in all others."""
        return tensor_key(self.name, self.section, self.entry)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The flat range [flat_start, flat_end) of one tensor of the state, as held by this rank.

    `tensor` has flat_end - flat_start elements, of any shape, on any device.
    """

    spec: TensorSpec
    flat_start: int
    flat_end: int
    tensor: torch.Tensor


def whole(name: str, tensor: torch.Tensor, *, section: str = MODEL, entry: str = "") -> Fragment:
    """Return all of `tensor` as a fragment."""
    tensor = tensor.detach()
    spec = TensorSpec(name=name, section=section, entry=entry, shape=tuple(tensor.shape), dtype=tensor.dtype)
    return Fragment(spec=spec, flat_start=0, flat_end=spec.num_elements, tensor=tensor)


class StateReader(Protocol):
    """Access to saved state by name. A restore reads only the ranges that its rank holds."""

    def specs(self) -> Iterable[TensorSpec]: ...

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int) -> torch.Tensor: ...


def specs_by_section(specs: Iterable[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """Return the tensors of each section; sections and tensors in the order given."""
    sections: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        sections.setdefault(spec.section, []).append(spec)
    return sections


def fragments_by_key(fragments: Iterable[Fragment]) -> dict[str, Fragment]:
    """Index fragments by their tensor's key. Raises AssertionError for a duplicate tensor."""
    by_key: dict[str, Fragment] = {}
    for fragment in _checked(fragments):
        assert fragment.spec.key not in by_key, f"{fragment.spec.key} is in the state twice"
        by_key[fragment.spec.key] = fragment
    return by_key


def _checked(fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    for fragment in fragments:
        assert fragment.tensor.numel() == fragment.flat_end - fragment.flat_start, fragment.spec.key
        yield fragment

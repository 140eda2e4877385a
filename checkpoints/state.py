"""The state type that strategies and checkpoints share: named pieces of named tensors."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT

WEIGHT = "weight"  # every other kind is an entry of the optimizer's state: exp_avg, step, ...


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Describe one whole tensor of a run's state: a parameter, a buffer, or an optimizer entry of a parameter."""

    name: str
    kind: str
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
        """Return the tensor's name inside its file: weights under their own, optimizer entries as `kind/name`."""
        return self.name if self.kind == WEIGHT else f"{self.kind}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Hold the flat range [flat_start, flat_end) of one tensor of the state, as this rank has it.

    `tensor` has flat_end - flat_start elements, any shape, any device.
    """

    spec: TensorSpec
    flat_start: int
    flat_end: int
    tensor: torch.Tensor


def whole(name: str, kind: str, tensor: torch.Tensor) -> Fragment:
    """Return the fragment that is all of `tensor`."""
    tensor = tensor.detach()
    spec = TensorSpec(name=name, kind=kind, shape=tuple(tensor.shape), dtype=tensor.dtype)
    return Fragment(spec=spec, flat_start=0, flat_end=spec.num_elements, tensor=tensor)


class StateReader(Protocol):
    """Give access to saved state by name; whoever restores asks for just the ranges that it holds."""

    def specs(self) -> Iterable[TensorSpec]: ...

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int) -> torch.Tensor: ...


def specs_by_kind(specs: Iterable[TensorSpec]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Split into (weights, optimizer entries), each in the order given."""
    weights: list[TensorSpec] = []
    optimizer: list[TensorSpec] = []
    for spec in specs:
        (weights if spec.kind == WEIGHT else optimizer).append(spec)
    return weights, optimizer


def fragments_by_key(fragments: Iterable[Fragment]) -> dict[str, Fragment]:
    """Index fragments by their tensor's key. Raise AssertionError when a tensor comes twice."""
    by_key: dict[str, Fragment] = {}
    for fragment in _checked(fragments):
        assert fragment.spec.key not in by_key, f"{fragment.spec.key} is in the state twice"
        by_key[fragment.spec.key] = fragment
    return by_key


def _checked(fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    for fragment in fragments:
        assert fragment.tensor.numel() == fragment.flat_end - fragment.flat_start, fragment.spec.key
        yield fragment

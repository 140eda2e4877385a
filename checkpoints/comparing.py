"""Compare two checkpoints: positions, options, and every tensor, read in pieces."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from shardlaunch.checkpoints.listing import file_records
from shardlaunch.checkpoints.manifest import read_manifest
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.state import MODEL, TensorSpec
from shardlaunch.checkpoints.verifying import ListedCheckpoint

PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """How far a tensor of two checkpoints, of the same shape and dtype, differs. NaN equals itself."""

    key: str
    section: str
    num_elements: int
    num_differing: int
    largest_absolute: float
    largest_relative: float
    """Of the differing elements: the difference by the larger absolute value."""


@dataclass(frozen=True, kw_only=True)
class OtherForm:
    """A tensor that has another shape or dtype in the other checkpoint."""

    key: str
    one: str
    other: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences of two checkpoints: values as pairs, of the first and of the second."""

    position: Mapping[str, tuple[Any, Any]]
    identity: Mapping[str, tuple[Any, Any]]
    """Of the runs: where it differs, they are other runs."""
    other_options: Mapping[str, tuple[Any, Any]]
    """That are not part of the identity."""
    only_in_one: tuple[str, ...]
    only_in_other: tuple[str, ...]
    other_form: tuple[OtherForm, ...]
    tensors: tuple[TensorDifference, ...]
    """Those that differ, the model's first, by the largest absolute difference."""
    num_equal: int

    @property
    def is_same(self) -> bool:
        return not (
            self.position or self.identity or self.only_in_one or self.only_in_other or self.other_form or self.tensors
        )


def compare(one: ListedCheckpoint, other: ListedCheckpoint, *, weights_only: bool = False) -> Comparison:
    """Compare two checkpoints. Needs memory for pieces of 2**20 elements; files of equal digests are not read.

    With `weights_only`, only tensors of the model section are compared. A tied weight is found under any of its names.
    """
    first, second = (Checkpoint(step_dir=it.step_dir, manifest=read_manifest(it.step_dir)) for it in (one, other))
    specs, other_specs = (_specs(checkpoint, weights_only=weights_only) for checkpoint in (first, second))
    _under_same_names(specs, other_specs, first, second)
    both = [key for key in specs if key in other_specs]
    forms = [OtherForm(key=key, one=_form(specs[key]), other=_form(other_specs[key])) for key in both]
    digests = [file_records(it.record) for it in (one, other)]
    differences = []
    num_equal = 0
    for key, form in zip(both, forms, strict=True):
        if form.one != form.other:
            continue
        spec, other_spec = specs[key], other_specs[key]
        is_same_file = digests[0][first.manifest.tensors[spec]] == digests[1][second.manifest.tensors[other_spec]]
        found = None if is_same_file and spec == other_spec else _difference(key, first, spec, second, other_spec)
        if found is None:
            num_equal += 1
        else:
            differences.append(found)
    positions = [{} if weights_only else msgspec.structs.asdict(it.position) for it in (one, other)]
    identity, options = ({}, {}) if weights_only else _options(one, other)
    return Comparison(
        position=_pairs(*positions),
        identity=identity,
        other_options=options,
        only_in_one=tuple(key for key in specs if key not in other_specs),
        only_in_other=tuple(key for key in other_specs if key not in specs),
        other_form=tuple(form for form in forms if form.one != form.other),
        tensors=tuple(sorted(differences, key=lambda it: (it.section != MODEL, -it.largest_absolute, it.key))),
        num_equal=num_equal,
    )


def _specs(checkpoint: Checkpoint, *, weights_only: bool) -> dict[str, TensorSpec]:
    return {spec.key: spec for spec in checkpoint.specs() if not weights_only or spec.section == MODEL}


def _under_same_names(
    specs: dict[str, TensorSpec], other_specs: dict[str, TensorSpec], first: Checkpoint, second: Checkpoint
) -> None:
    """Give tied weights, which two checkpoints may keep under different ones of their names, the first one's names."""
    for alias, name in first.manifest.aliases.items():
        if alias in other_specs and alias not in specs and name not in other_specs:
            other_specs[name] = other_specs.pop(alias)
    for alias, name in second.manifest.aliases.items():
        if alias in specs and alias not in other_specs and name in other_specs and name not in specs:
            other_specs[alias] = other_specs.pop(name)


def _form(spec: TensorSpec) -> str:
    return f"{'x'.join(map(str, spec.shape)) or 'scalar'} {str(spec.dtype).removeprefix('torch.')}"


def _difference(
    key: str, first: Checkpoint, spec: TensorSpec, second: Checkpoint, other_spec: TensorSpec
) -> TensorDifference | None:
    """Return how two tensors differ, None if they do not."""
    num_differing, absolute, relative = 0, 0.0, 0.0
    for start, end in pieces(spec.num_elements):
        one, other = first.read(spec, start, end), second.read(other_spec, start, end)
        if torch.equal(one, other):
            continue
        differs = one != other
        if spec.dtype.is_floating_point:
            differs &= ~(one.isnan() & other.isnan())
        count = int(differs.sum())
        if not count:
            continue
        num_differing += count
        a, b = one[differs].double(), other[differs].double()
        by = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        absolute = max(absolute, by.max().item())
        scale = torch.maximum(a.abs(), b.abs())
        relative = max(relative, (by / scale).nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    if not num_differing:
        return None
    return TensorDifference(
        key=key,
        section=spec.section,
        num_elements=spec.num_elements,
        num_differing=num_differing,
        largest_absolute=absolute,
        largest_relative=relative,
    )


def pieces(num_elements: int) -> Iterator[tuple[int, int]]:
    """Yield the flat ranges in which a tensor is read."""
    for start in range(0, num_elements, PIECE_ELEMENTS):
        yield start, min(start + PIECE_ELEMENTS, num_elements)


def _options(
    one: ListedCheckpoint, other: ListedCheckpoint
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """Return the pairs of values that differ: of the identity, and of other options and the environment."""
    records = [it.recipe for it in (one, other)]
    identities = [dict(record.run.identity) if record else {} for record in records]
    options = [
        {f"--{name.replace('_', '-')}": value for name, value in record.options.items()} | dict(record.run.warn)
        if record
        else {}
        for record in records
    ]
    identity = _pairs(*identities)
    known = identities[0].keys() | identities[1].keys()
    return identity, {name: pair for name, pair in _pairs(*options).items() if name not in known}


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ, by name; None for one that is not there. NaN equals itself, as text does."""
    names = dict.fromkeys([*one, *other])
    return {name: (one.get(name), other.get(name)) for name in names if str(one.get(name)) != str(other.get(name))}

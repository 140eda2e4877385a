"""A table of how the parameters of a model are trained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """One row of the table: the parameters of one part of the model with the same settings."""

    names: str
    num_tensors: int
    num_elements: int
    lr: float | None
    """None: frozen."""
    weight_decay: float


def parameter_rows(
    numels: Mapping[str, int], trained: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> list[ParameterRow]:
    """Return one row per part of the model and settings. `numels` has the number of elements of each parameter."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    settings = {name: groups.get(id(parameter), {}) for name, parameter in trained}  # a missing one is refused later
    rows: dict[tuple[str, float | None, float], list[str]] = {}
    for name in numels:
        group = settings.get(name, {})
        key = (part_of(name), group.get("lr"), group.get("weight_decay", 0.0))
        rows.setdefault(key, []).append(name)
    return [
        ParameterRow(
            names=names[0] if len(names) == 1 else f"{part}.*" if part else "(top level)",
            num_tensors=len(names),
            num_elements=sum(numels[name] for name in names),
            lr=lr,
            weight_decay=weight_decay,
        )
        for (part, lr, weight_decay), names in rows.items()
    ]


def part_of(name: str) -> str:
    """Return a parameter's part of the model: its first two module names, without the number of a list item."""
    modules = name.split(".")[:-1][:2]
    return ".".join(module for number, module in enumerate(modules) if not (number and module.isdecimal()))


def counts_by_part(columns: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
    """Return table rows: a part of the model, and how many of each column's parameters are in it (empty: none)."""
    counts: dict[str, list[int]] = {}
    for column, names in enumerate(columns):
        for name in names:
            counts.setdefault(part_of(name) or name, [0] * len(columns))[column] += 1
    return [(part, *(str(count) if count else "" for count in row)) for part, row in counts.items()]

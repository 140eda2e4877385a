"""How the parameters of a model are trained, as rows of a table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """Hold one line of the table of parameters: those of one part of the model that are treated alike."""

    names: str
    num_tensors: int
    num_elements: int
    lr: float | None
    """None: frozen."""
    weight_decay: float


def parameter_rows(
    numels: Mapping[str, int], trained: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> list[ParameterRow]:
    """Return how a model's parameters (elements by name) are trained, a row for those of one part that are alike."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    treated = {name: groups[id(parameter)] for name, parameter in trained}
    rows: dict[tuple[str, float | None, float], list[str]] = {}
    for name in numels:
        group = treated.get(name, {})
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
    """Return the part of a model that a parameter is in: a module or a module's module, a list of them as one."""
    modules = name.split(".")[:-1][:2]
    return ".".join(module for number, module in enumerate(modules) if not (number and module.isdecimal()))

"""Several optimizers, each of a part of the parameters, that strategies and checkpoints take for one."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ONLY_ONE = ""
"""The name of the optimizer of a run that has one."""


class Optimizers(torch.optim.Optimizer):
    """Optimizers by name, with the parameter groups and the state of all of them."""

    def __init__(self, by_name: Mapping[str, torch.optim.Optimizer]) -> None:
        self.by_name = dict(by_name)
        self.defaults = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the groups of all optimizers in their order; a caller may set values in them."""
        return [group for optimizer in self.by_name.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        """Return the state of all parameters."""
        return {parameter: its for one in self.by_name.values() for parameter, its in one.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups alone: their parameters are numbered in each optimizer anew."""
        groups = [group for each in self.by_name.values() for group in each.state_dict()["param_groups"]]
        return {"state": {}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the state of all parameters, by their position in the groups of all optimizers; groups stay as set."""
        first = 0
        for optimizer in self.by_name.values():
            end = first + sum(len(group["params"]) for group in optimizer.param_groups)
            state = {place - first: entries for place, entries in state_dict["state"].items() if first <= place < end}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            first = end


def optimizers_by_name(optimizer: torch.optim.Optimizer) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers that one stands for, by name; itself if it is one."""
    return optimizer.by_name if isinstance(optimizer, Optimizers) else {ONLY_ONE: optimizer}


@contextmanager
def only_needing_gradients(chosen: Iterable[torch.Tensor], everything: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let only the chosen parameters of some that are trained need gradients, within."""
    ids = {id(parameter) for parameter in chosen}
    others = [parameter for parameter in everything if id(parameter) not in ids]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)

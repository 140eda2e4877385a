"""A model as others call it: tensors in, tensors out, without the recipe around it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardlaunch.errors import UserError, some

_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a recipe's forward() gives the model: tensors by name, in order, and other arguments."""

    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]


class PlainModel(nn.Module):
    """A model whose arguments are tensors in an order, and whose result is a tuple of tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._names = list(names)
        self._constants = dict(constants)
        self._positional = _positional(model)
        self.output_names: list[str] = []
        """Of the last call."""

    def of(self, model: nn.Module) -> "PlainModel":
        """Return another model that is called alike."""
        return PlainModel(model, self._names, self._constants)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self._names, tensors, strict=True)) | self._constants
        args = []
        for name in self._positional:  # as many as can be, for forward() of modules that take none by name
            if name not in given:
                break
            args.append(given.pop(name))
        outputs = named_outputs(self.model(*args, **given))
        if not torch.compiler.is_exporting() and not torch.jit.is_tracing():
            self.output_names = list(outputs)
        return tuple(outputs.values())


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's result by name: of a transformers model its logits alone, where it has them."""
    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, torch.Tensor):
        return {"logits": logits}
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return {f"output_{number}": leaf for number, leaf in enumerate(leaves)}


def call_of(model: nn.Module, args: Sequence[Any], given: Mapping[str, Any]) -> Call:
    """Return a call of a model by the names of its arguments. Raises UserError for arguments that hold tensors."""
    names = _positional(model)
    if len(args) > len(names):
        raise UserError(f"export: {type(model).__name__}.forward() has no names for its {len(args)} arguments")
    named = dict(zip(names, args, strict=False)) | dict(given)
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in named.items() if name not in tensors}
    leaves = {name: tree_leaves(value) for name, value in others.items()}
    nested = [name for name, found in leaves.items() if any(isinstance(leaf, torch.Tensor) for leaf in found)]
    if nested or not tensors:
        what = f"tensors within {some(nested)}" if nested else "no tensors"
        raise UserError(f"export: the recipe's forward() gives the model {what}; a plain model takes tensors by name")
    odd = [name for name, found in leaves.items() if not all(isinstance(leaf, _PLAIN) for leaf in found)]
    if odd:
        raise UserError(f"export: the recipe's forward() gives the model {some(odd)}, which no file format holds")
    return Call(tensors=tensors, constants=others)


def _positional(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [one.name for one in parameters if one.kind in kinds]

"""The forward pass of a micro-batch, in training and evaluation."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.launcher.logged import Logged, collecting
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.training.batches import MicroBatch
from shardlaunch.sharding.precision import Precision

_IS_ABOUT_DTYPES = re.compile(r"same dtype|scalar type|Input type|data type", re.I)


class Forward(NamedTuple):
    """A micro-batch on the device, the model's outputs, the sum of the loss, and what the recipe has logged."""

    inputs: Any
    outputs: Any
    loss: torch.Tensor
    logged: Logged


def forward(
    recipe: Recipe, model: nn.Module, micro_batch: MicroBatch, precision: Precision, device: torch.device
) -> Forward:
    """Return what comes of a micro-batch.

    Raises UserError when the recipe's loss is not a scalar, or its forward() bypasses a sharded model.
    """
    inputs = to_device(micro_batch.inputs, device)
    with precision.forward_context(), collecting(recipe) as logged:
        try:
            outputs = recipe.forward(model, inputs)
        except RuntimeError as error:
            if _IS_ABOUT_DTYPES.search(str(error)) and torch.float64 in _dtypes(inputs):
                raise UserError(
                    f"the batch has float64 numbers (numpy's default), which the model does not take: "
                    f"{str(error).splitlines()[0]}. Convert them in the data set or in collate(): .float()"
                ) from error
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise UserError(
                "the recipe's forward() calls a submodule or method of a model whose parameters are sharded; it must "
                "call the model itself (model(...)). Change it, or use --strategy ddp, zero1 or zero2"
            ) from error
        loss = recipe.loss(outputs, inputs)
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        got = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UserError(f"the recipe's loss() must return a scalar tensor, the sum over targets; it returned {got}")
    return Forward(inputs, outputs, loss, logged)


def _dtypes(value: Any) -> set[torch.dtype]:
    """Return the dtypes of the tensors in a batch."""
    if isinstance(value, torch.Tensor):
        return {value.dtype}
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return {dtype for item in items for dtype in _dtypes(item)}


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested mappings and sequences to a device."""
    if device.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(value, "to"):  # such as a tokenizer's BatchEncoding
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value

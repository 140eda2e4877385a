"""The forward pass of a micro-batch, in training and evaluation."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.logged import Logged, collecting
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.step import LossOf
from shardlaunch.launcher.training.batches import MicroBatch
from shardlaunch.sharding.precision import Precision

_IS_ABOUT_DTYPES = re.compile(r"same dtype|scalar type|Input type|data type", re.I)


class Denominators(NamedTuple):
    """What sums of losses are divided by: the numbers of targets of the global batch, in all or by loss."""

    num_targets: int
    by_loss: Mapping[str, int] = MappingProxyType({})

    def of(self, name: str) -> int:
        """Return what the loss of a name is divided by."""
        return max(1, self.by_loss[name] if self.by_loss else self.num_targets)


class Forward(NamedTuple):
    """A micro-batch on the device, the model's outputs, the loss, and what the recipe has logged.

    The loss is the sum over targets; of several losses (`names`), the sum of what each is divided by its denominator.
    """

    inputs: Any
    outputs: Any
    loss: torch.Tensor
    logged: Logged
    names: tuple[str, ...] = ()


def forward(
    recipe: Recipe,
    model: nn.Module,
    micro_batch: MicroBatch,
    precision: Precision,
    device: torch.device,
    *,
    loss_of: LossOf | None = None,
    denominators: Denominators | None = None,
) -> Forward:
    """Return what comes of a micro-batch: of the recipe's forward() and loss(), or of `loss_of`.

    Without `denominators`, several losses are added up. Raises UserError when the recipe's loss is not a scalar, or its
    forward() bypasses a sharded model.
    """
    if loss_of is None and type(recipe).loss is Recipe.loss:
        raise UserError(
            "the recipe defines no loss(): it is needed to evaluate, and for updates without a loss of their own. "
            "Define it, or return no data 'eval' and use no --folds"
        )
    inputs = to_device(micro_batch.inputs, device)
    outputs: Any = None
    with precision.forward_context(), collecting(recipe) as logged:
        with explained_errors(inputs):
            if loss_of is not None:
                loss = loss_of(model, inputs)
            else:
                outputs = recipe.forward(model, inputs)
        if loss_of is None:
            loss = recipe.loss(outputs, inputs)
        total = total_loss(recipe, loss, micro_batch, denominators, source=source_of(loss_of))
    names = tuple(loss) if isinstance(loss, Mapping) else ()
    return Forward(inputs, outputs, total, logged, names)


def source_of(function: Callable[..., Any] | None) -> str:
    """Return how a message names a function that returns a loss; None: the recipe's loss()."""
    return f"{getattr(function, '__name__', 'the function')}()" if function is not None else "loss()"


def total_loss(
    recipe: Recipe, loss: Any, micro_batch: MicroBatch, denominators: Denominators | None, *, source: str
) -> torch.Tensor:
    """Return what is differentiated of a loss, and log several by their names. Raises UserError if it is no loss."""
    if not isinstance(loss, Mapping):
        if micro_batch.targets:
            raise UserError(
                f"num_targets() returns numbers by loss ({some(micro_batch.targets)}), so that the recipe's {source} "
                f"must return sums by these names"
            )
        return _checked(loss, source)
    if not loss:
        raise UserError(f"the recipe's {source} returned no losses")
    totals = []
    for name, each in loss.items():
        if micro_batch.targets and name not in micro_batch.targets:
            raise UserError(
                f"the recipe's {source} returns a loss {name!r}, of which num_targets() returns no number; it has "
                f"{some(micro_batch.targets)}"
            )
        value = _checked(each, f"{source}[{name!r}]")
        recipe.log(name, value, micro_batch.targets.get(name, micro_batch.num_targets))
        totals.append(value if denominators is None else value / denominators.of(name))
    return sum(totals[1:], totals[0])


def _checked(loss: Any, source: str) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        got = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UserError(f"the recipe's {source} must return a scalar tensor, the sum over targets; it returned {got}")
    return loss


@contextmanager
def explained_errors(inputs: Any) -> Iterator[None]:
    """Raise UserError for known errors of torch within a forward pass of a recipe."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0] if str(error) else ""
        if _IS_ABOUT_DTYPES.search(str(error)) and torch.float64 in _dtypes(inputs):
            raise UserError(
                f"the batch has float64 numbers (numpy's default), which the model does not take: {text}. Convert them "
                f"in the data set or in collate(): .float()"
            ) from error
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise UserError(
            "the recipe's forward() calls a submodule or method of a model whose parameters are sharded; it must "
            "call the model itself (model(...)). Change it, or use --strategy ddp, zero1 or zero2"
        ) from error


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

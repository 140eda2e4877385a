"""State of a model and its optimizer by parameter name: out of them and back, whole tensors or this rank's slices.

A tensor is held whole (a plain tensor) or sliced along dimension 0 over a mesh of ranks (a DTensor, see `slices`).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shardlaunch.checkpoints.state import MODEL, OPTIMIZER, Fragment, StateReader, TensorSpec
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES
from shardlaunch.errors import UserError, some
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.slices import fragment, like_slice, local_part, read_slice


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer has every trainable parameter just once. Raises UserError that names the others."""
    seen: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS evaluates the loss several times a step, which a run does not; use another optimizer")
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and seen.pop(id(p), 0) != 1]
    if wrong:
        raise UserError(
            f"the recipe's optimizer() must have every trainable parameter once; {some(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or there twice"
        )


def group_hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what each parameter group holds besides parameters and learning rate.

    Some optimizers keep state there. Raises UserError when it is not made of numbers and texts.
    """
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]
    try:
        numbers: list[dict[str, Any]] = json.loads(json.dumps(groups))
    except TypeError as error:
        raise UserError(f"{type(optimizer).__name__} cannot be saved: in its parameter groups, {error}") from error
    return numbers


def restore_group_hyperparameters(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Set what `group_hyperparameters` gave, where it differs."""
    here = group_hyperparameters(optimizer)
    for group, numbers, others in zip(optimizer.param_groups, here, saved, strict=True):
        group.update({key: value for key, value in others.items() if value != numbers.get(key)})


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    """Yield all weights, persistent buffers and optimizer entries, in the model's order.

    Raises UserError for an optimizer whose state is not made of tensors.
    """
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
        yield fragment(name, tensor)
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES:
                yield fragment(name, value, section=OPTIMIZER, entry=entry)
            elif value is not None:
                found = getattr(value, "dtype", type(value).__name__)
                raise UserError(
                    f"{type(optimizer).__name__} keeps {entry!r} of {name} as {found}, which a checkpoint cannot hold; "
                    f"use another optimizer"
                )


@torch.no_grad()
def restore_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, reader: StateReader) -> None:
    """Set weights, buffers and optimizer entries to the saved ones. Raises UserError when names or shapes differ."""
    specs = list(reader.specs())
    weights = {spec.name: spec for spec in specs if spec.section == MODEL}
    targets = dict(model.named_parameters()) | persistent_buffers(model)
    check_names(weights, targets)
    for name, tensor in targets.items():
        local_part(tensor).copy_(read_slice(reader, weights[name], tensor))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    by_name = dict(model.named_parameters())
    for spec in specs:
        if spec.section == OPTIMIZER:
            parameter = by_name.get(spec.name)
            if parameter is None or id(parameter) not in position:
                raise UserError(f"the checkpoint has {spec.entry} of {spec.name}, which this run does not train")
            # An entry that is not of the parameter's shape (a count of steps) is held whole.
            like = parameter if spec.shape == tuple(parameter.shape) else torch.empty(spec.shape)
            state.setdefault(position[id(parameter)], {})[spec.entry] = like_slice(read_slice(reader, spec, like), like)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_names(saved: Mapping[str, TensorSpec], targets: Mapping[str, torch.Tensor]) -> None:
    """Check that saved weights are just those of the model. Raises UserError that names those which are not."""
    missing = [name for name in targets if name not in saved]
    unexpected = [name for name in saved if name not in targets]
    misshapen = [
        f"{name} (saved {list(saved[name].shape)}, here {list(tensor.shape)})"
        for name, tensor in targets.items()
        if name in saved and saved[name].shape != tuple(tensor.shape)
    ]
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"the checkpoint is of another model; tensors {'; '.join(problems)}")

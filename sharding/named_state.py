"""Save and restore the state of a model and its optimizer by parameter name: whole tensors or this rank's shards.

A tensor is whole (a plain tensor) or sharded along dimension 0 over a mesh of ranks (a DTensor, see `shards`).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from shardlaunch.checkpoints.records import as_meant, to_json
from shardlaunch.checkpoints.state import EMA, MODEL, OPTIMIZER, Fragment, StateReader, TensorSpec
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES
from shardlaunch.errors import UserError, some
from shardlaunch.sharding.averages import Average
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.optimizers import optimizers_by_name
from shardlaunch.sharding.parts import part_of
from shardlaunch.sharding.shards import fill_shard, fragment, read_shard, shard_like

_STAND_IN = "_shardlaunch_stand_in"


def optimized(parameter: nn.Parameter) -> nn.Parameter:
    """Return what the optimizer updates in place of a parameter: itself, or another view of its memory (`stand_in`)."""
    found: nn.Parameter = getattr(parameter, _STAND_IN, parameter)
    return found


def stand_in(parameter: nn.Parameter, view: nn.Parameter) -> None:
    """Let the optimizer update `view`, which shares its memory with the parameter, in the parameter's place."""
    setattr(parameter, _STAND_IN, view)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError unless the optimizer has every trainable parameter exactly once."""
    seen: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    each = optimizers_by_name(optimizer)
    if any(isinstance(one, torch.optim.SparseAdam) for one in each.values()):
        raise UserError("SparseAdam takes sparse gradients only, but gradients are summed densely here; use Adam")
    if any(isinstance(one, torch.optim.LBFGS) for one in each.values()):
        raise UserError(
            "LBFGS evaluates the loss several times per step, which is not supported; use another optimizer"
        )
    owners = {
        name: {id(parameter) for group in one.param_groups for parameter in group["params"]}
        for name, one in each.items()
    }
    for name, parameter in model.named_parameters():
        several = [owner for owner, ids in owners.items() if id(optimized(parameter)) in ids]
        if len(several) > 1:
            raise UserError(
                f"the recipe's optimizer() gives {name} to {' and '.join(map(repr, several))}; each parameter must be "
                f"in one optimizer"
            )
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and seen.pop(id(optimized(p)), 0) != 1]
    if wrong:
        raise UserError(
            f"the recipe's optimizer() must include every trainable parameter exactly once; {some(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or duplicated"
        )


def trained_by(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those of some parameters that an optimizer updates, in their order."""
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in parameters if id(optimized(parameter)) in ids]


def group_hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each parameter group's settings besides parameters and learning rate.

    Some optimizers keep state there. NaN and infinities are text. Raises UserError when a value cannot be written as
    JSON.
    """
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]
    try:
        hyperparameters: list[dict[str, Any]] = msgspec.json.decode(to_json(groups))
    except TypeError as error:
        raise UserError(
            f"{type(optimizer).__name__} cannot be saved: its parameter groups hold a value that is not JSON ({error})"
        ) from error
    return hyperparameters


def restore_group_hyperparameters(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Set the saved result of `group_hyperparameters`, where it differs.

    An optimizer may begin to keep a value in its groups with its first step. Raises UserError for the result of another
    optimizer.
    """
    current = group_hyperparameters(optimizer)
    if len(current) != len(saved):
        raise UserError(
            f"the checkpoint is from another optimizer: it has {len(saved)} parameter groups, here are {len(current)}"
        )
    for group, now, before in zip(optimizer.param_groups, current, saved, strict=True):
        changed = {key: value for key, value in before.items() if value != now.get(key)}
        for key, value in changed.items():
            if key in now and _kind(value) != _kind(now[key]):
                raise UserError(
                    f"the checkpoint is from another optimizer: its {key} is {value!r}, here it is {now[key]!r}"
                )
        group.update(as_meant(changed))


def _kind(value: Any) -> type:
    """Return the type of a JSON value: the same for all numbers, and for what is on, off or left to the optimizer."""
    value = as_meant(value)
    return bool if value is None else float if type(value) is int else type(value)


def named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> Iterator[Fragment]:
    """Yield all weights, persistent buffers and optimizer entries, then the average, each in the model's order.

    Raises UserError for an optimizer that keeps state other than tensors.
    """
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
        yield fragment(name, tensor, part=part_of(tensor))
    state = optimizer.state
    for name, parameter in model.named_parameters():
        for entry, value in state.get(optimized(parameter), {}).items():
            if isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES:
                part = part_of(parameter) if value.shape == parameter.shape else None
                yield fragment(name, value, section=OPTIMIZER, entry=entry, part=part)
            elif value is not None:
                found = getattr(value, "dtype", type(value).__name__)
                raise UserError(
                    f"{type(optimizer).__name__} keeps {entry!r} of {name} as {found}, which cannot be saved in a "
                    f"checkpoint; use another optimizer"
                )
    if average is not None and average.num_updates:
        parameters = dict(model.named_parameters())
        for name, value in average.values.items():
            like = parameters[name]
            yield fragment(name, shard_like(value, like), section=EMA, part=part_of(like))
        for name, value in average.buffers.items():
            yield fragment(name, value, section=EMA)


@torch.no_grad()
def restore_named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, reader: StateReader, average: Average | None = None
) -> None:
    """Restore weights, buffers, optimizer entries and average. Raises UserError when names or shapes differ."""
    specs = list(reader.specs())
    weights = {spec.name: spec for spec in specs if spec.section == MODEL}
    targets = dict(model.named_parameters()) | persistent_buffers(model)
    check_names(weights, targets)
    for name, tensor in targets.items():
        fill_shard(reader, weights[name], tensor, part_of(tensor))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    by_name = dict(model.named_parameters())
    for spec in specs:
        if spec.section == OPTIMIZER:
            parameter = optimized(by_name[spec.name]) if spec.name in by_name else None
            if parameter is None or id(parameter) not in position:
                raise UserError(
                    f"the checkpoint has {spec.entry} of {spec.name}, but this run does not train that parameter"
                )
            # An entry of another shape than its parameter (a step count) is kept whole.
            is_like = spec.shape == _whole_shape(by_name[spec.name])
            like = parameter if is_like else torch.empty(spec.shape)
            values = read_shard(reader, spec, like, part_of(by_name[spec.name]) if is_like else None)
            state.setdefault(position[id(parameter)], {})[spec.entry] = shard_like(values, like)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if average is None:
        return
    for name, averaged in average.begin_restore(reader).items():
        if name in average.buffers:
            fill_shard(reader, averaged, average.buffers[name])
        elif name in average.values:
            like = by_name[name]
            fill_shard(reader, averaged, shard_like(average.values[name], like), part_of(like))


def _whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    part = part_of(tensor)
    return tuple(tensor.shape) if part is None else part.whole_shape(tensor.shape)


def check_names(saved: Mapping[str, TensorSpec], targets: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError unless the saved weights have exactly the model's names and shapes."""
    missing = [name for name in targets if name not in saved]
    unexpected = [name for name in saved if name not in targets]
    other_shapes = [
        f"{name} (saved {list(saved[name].shape)}, here {list(_whole_shape(tensor))})"
        for name, tensor in targets.items()
        if name in saved and saved[name].shape != _whole_shape(tensor)
    ]
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other_shapes))
        if names
    ]
    if problems:
        raise UserError(f"the checkpoint is from another model: tensors {'; '.join(problems)}")

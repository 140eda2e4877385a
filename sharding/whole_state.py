"""State of models that every rank holds whole: out of module and optimizer by name, and back."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from shardlaunch.checkpoints.state import WEIGHT, Fragment, StateReader, TensorSpec, whole
from shardlaunch.errors import UserError
from shardlaunch.sharding.buffers import persistent_buffers

MOST_NAMED = 10


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer has every trainable parameter just once. Raises UserError that names the others."""
    seen: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and seen.pop(id(p), 0) != 1]
    if wrong:
        raise UserError(
            f"the recipe's optimizer() must have every trainable parameter once; {some(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or there twice"
        )


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    """Yield all weights, persistent buffers and optimizer entries, in the model's order.

    Raises UserError for an optimizer whose state is not made of tensors.
    """
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
        yield whole(name, WEIGHT, tensor)
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                yield whole(name, kind, value)
            elif value is not None:
                raise UserError(
                    f"{type(optimizer).__name__} keeps {kind!r} of {name} as {type(value).__name__}; "
                    f"checkpoints hold tensors only, so use another optimizer"
                )


@torch.no_grad()
def restore_whole_state(model: nn.Module, optimizer: torch.optim.Optimizer, reader: StateReader) -> None:
    """Set weights, buffers and optimizer entries to the saved ones. Raises UserError when names or shapes differ."""
    specs = list(reader.specs())
    weights = {spec.name: spec for spec in specs if spec.kind == WEIGHT}
    targets = dict(model.named_parameters()) | persistent_buffers(model)
    _check_names(weights, targets)
    for name, tensor in targets.items():
        tensor.copy_(_read(reader, weights[name]))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    by_name = dict(model.named_parameters())
    for spec in specs:
        if spec.kind != WEIGHT:
            if spec.name not in by_name or id(by_name[spec.name]) not in position:
                raise UserError(f"the checkpoint has {spec.kind} of {spec.name}, which this run does not train")
            state.setdefault(position[id(by_name[spec.name])], {})[spec.kind] = _read(reader, spec)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(reader: StateReader, spec: TensorSpec) -> torch.Tensor:
    return reader.read(spec, 0, spec.num_elements).reshape(spec.shape)


def _check_names(saved: dict[str, TensorSpec], targets: dict[str, torch.Tensor]) -> None:
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


def some(names: Iterable[str]) -> str:
    """Join names, at most ten of them, with the count of the others."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more

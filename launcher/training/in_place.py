"""A model that changes its own parameters in a forward pass, as some averages of weights and norms do, is found."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.sharding.shards import local_shard

_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_Sums = dict[str, tuple[nn.Parameter, int, torch.Tensor]]


@contextmanager
def parameters_stay(model: nn.Module) -> Iterator[None]:
    """Raise UserError if a parameter has another value after what is done within: a forward pass.

    It would be changed once per micro-batch that a rank runs, on each rank otherwise; or a gathered copy would be that
    is dropped. So each module's are compared too, while they are gathered.
    """
    changed: set[str] = set()
    running: dict[str, _Sums] = {}
    handles = []

    def own(name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return a module's parameters; of the model those of all modules, of which some may be gathered with it."""
        prefix = f"{name}." if name else ""
        return {f"{prefix}{key}": parameter for key, parameter in module.named_parameters(recurse=not name)}

    def before(name: str, module: nn.Module, args: Any) -> None:
        running[name] = _sums(own(name, module))

    def after(name: str, module: nn.Module, args: Any, outputs: Any) -> None:
        changed.update(_changed(running.pop(name, {}), own(name, module)))

    for name, module in model.named_modules():
        if module._parameters or not name:
            handles.append(module.register_forward_pre_hook(partial(before, name)))
            # Before the strategy's own, which may drop what it has gathered.
            handles.append(module.register_forward_hook(partial(after, name), prepend=True))
    start = _sums(dict(model.named_parameters()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    changed.update(_changed(start, dict(model.named_parameters())))
    if changed:
        raise UserError(
            f"the forward pass changes {some(sorted(changed))} in place. That happens once per micro-batch, so the run "
            f"would depend on how many a rank has. For an average of weights use --ema, or buffers (register_buffer), "
            f"which are averaged over the micro-batches of a step; use changed values without storing them (instead of "
            f"an embedding's max_norm, say)"
        )


@contextmanager
def changed_parameters(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that has, afterwards, the names of the parameters that have other values than before."""
    changed: list[str] = []
    start = _sums(dict(model.named_parameters()))
    yield changed
    changed += _changed(start, dict(model.named_parameters()))


def _sums(parameters: Mapping[str, nn.Parameter]) -> _Sums:
    return {name: (parameter, parameter.numel(), sum_of_bits(parameter)) for name, parameter in parameters.items()}


def _changed(before: _Sums, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return names of parameters that have other values than before; of those not replaced or gathered meanwhile."""
    return [
        name
        for name, (parameter, size, total) in before.items()
        if parameters.get(name) is parameter
        and parameter.numel() == size
        and not torch.equal(sum_of_bits(parameter), total)
    ]


@torch.no_grad()
def sum_of_bits(parameter: torch.Tensor) -> torch.Tensor:
    """Return the sum of the bits of this rank's part of a parameter, as integers."""
    values = local_shard(parameter).contiguous().reshape(-1)
    per_integer = 8 // values.element_size()
    first = min(len(values), -values.storage_offset() % per_integer)
    last = first + (len(values) - first) // per_integer * per_integer
    # As 64-bit integers: to widen those of 32 bits takes 40 times as long.
    whole = values[first:last].view(torch.int64).sum()
    return whole + torch.cat((values[:first], values[last:])).view(_AS_INTEGERS[values.element_size()]).sum()

"""Keep all ranks in step under ZeRO: reduce gradients and gather parameters in the same order on all ranks.

DeepSpeed reduces gradients in the order in which a backward pass reaches them and skips those that it does not reach.
Ranks whose passes differ would then silently sum unrelated gradients, or hang.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from shardlaunch.sharding.gradients import reached_again
from shardlaunch.sharding.lockstep import Lockstep

REDUCE = -2


def gather_in_lockstep(zero: Any, lockstep: Lockstep) -> None:
    """Make stage 3 gather a module's parameters only when all ranks are about to gather the same ones."""
    coordinator = zero.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def fetch_in_lockstep(module: Any, forward: bool) -> None:
        lockstep.step(2 * module.ds_id + forward)
        fetch(module, forward)

    coordinator.fetch_sub_module = fetch_in_lockstep


def release_all(zero: Any, parameters: Iterable[Any]) -> None:
    """Let go of the parameters that a backward pass of stage 3 has left gathered, but for those that stay so.

    DeepSpeed lets a module go when the gradients of its inputs are there. Where these need none, which may differ
    between ranks, it keeps some; the next pass would gather them on the other ranks only. The small parameters that
    stay gathered do so once it knows the order of modules; until then it lets them go too.
    """
    coordinator = zero.parameter_offload.get_param_coordinator()
    keeps_small = coordinator.is_complete_trace()
    for parameter in parameters:
        if parameter.ds_status.name == "AVAILABLE" and not (parameter.ds_persist and keeps_small):
            parameter.ds_active_sub_modules.clear()
            coordinator._PartitionedParameterCoordinator__release_param(parameter)


class GradientOrder:
    """Pass gradients to ZeRO from the last parameter to the first, each as soon as it is available and due.

    Parameters that a backward pass does not reach get zero gradients. So each pass reduces all parameters, in buckets
    that depend only on the model.
    """

    def __init__(self, zero: Any, parameters: Iterable[nn.Parameter], *, lockstep: Lockstep | None) -> None:
        self._zero = zero
        self._lockstep = lockstep
        self._parameters = list(reversed(list(parameters)))
        self._index = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._groups = {id(p): index for index, group in enumerate(_groups(zero)) for p in group}
        self._ready: set[int] = set()  # indices of parameters whose gradient is available, or will not come
        self._next = 0
        # DeepSpeed's parameter hooks call this with a parameter (and, in stage 2, its group).
        self._reduce = zero.reduce_ready_partitions_and_remove_grads
        zero.reduce_ready_partitions_and_remove_grads = self._on_gradient

    def _on_gradient(self, parameter: nn.Parameter, *_: int) -> None:
        index = self._index[id(parameter)]
        if index < self._next:
            raise reached_again()
        if not self._ready:
            self._ready = {index for index, other in enumerate(self._parameters) if not _will_be_reached(other)}
        self._ready.add(index)
        while self._next in self._ready:
            self._reduce_next()

    def finish(self) -> None:
        """Reduce the remaining parameters, with zeros for those that the backward pass did not reach."""
        while self._next < len(self._parameters):
            self._reduce_next()
        self._ready.clear()
        self._next = 0

    def _reduce_next(self) -> None:
        parameter: Any = self._parameters[self._next]
        self._next += 1
        fill_gradient(parameter)
        if self._lockstep is None:
            self._reduce(parameter, self._groups[id(parameter)])
            return
        (bucket,) = self._zero.ipg_buckets.values()
        if bucket.elements > 0 and bucket.elements + parameter.ds_numel > self._zero.reduce_bucket_size:
            self._lockstep.step(REDUCE)
        self._reduce(parameter)


def _will_be_reached(parameter: nn.Parameter) -> bool:
    """Return whether the running backward pass has this parameter in its graph."""
    with torch.enable_grad():
        node = get_gradient_edge(parameter).node
    return bool(torch._C._will_engine_execute_node(node))


def _groups(zero: Any) -> list[list[nn.Parameter]]:
    groups: list[list[nn.Parameter]] = zero.fp16_groups if hasattr(zero, "fp16_groups") else zero.bit16_groups
    return groups


def fill_gradient(parameter: Any) -> None:
    """Give a parameter without a gradient a zero gradient, in its full shape even if it is partitioned."""
    if parameter.grad is not None:
        return
    held = parameter.data
    zeros = torch.zeros(getattr(parameter, "ds_shape", held.shape), dtype=held.dtype, device=held.device)
    parameter.data = zeros  # autograd only accepts a gradient of the parameter's current shape
    parameter.grad = zeros
    parameter.data = held

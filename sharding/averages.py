"""An average of a run's weights, beside them: each rank keeps that of the shards which it has.

Floating-point buffers, such as batch-norm statistics, are averaged alike, so that they fit the averaged weights; other
buffers, such as counters, are taken as they are. Frozen parameters have no average: it would be their value.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardlaunch.checkpoints.state import EMA, MODEL, StateReader, TensorSpec
from shardlaunch.errors import UserError, some
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.exact_step import lerp_exactly

_CHUNK = 1 << 22  # elements that are exchanged at once


class Average:
    """The average of what this rank has of the trained weights, and of the floating-point buffers, at least in fp32."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, trained: Mapping[str, torch.Tensor], *, is_exact: bool = False) -> None:
        """`trained`: what the optimizer changes by name, weights or what takes their place; plain or distributed."""
        self._model = model
        self._trained = trained
        self._is_exact = is_exact
        self.values = {name: torch.zeros_like(weight) for name, weight in self._weights().items()}
        """The averages of the shards, by their names."""
        self.buffers: dict[str, torch.Tensor] = {}
        """The averages of the buffers, by name."""
        self._flat: dict[torch.dtype, torch.Tensor] = {}  # all of a dtype, for one operation on them
        self._names: dict[torch.dtype, list[str]] = {}
        for name, buffer in persistent_buffers(model).items():
            if buffer.is_floating_point():
                self._names.setdefault(_dtype_of(buffer), []).append(name)
        for dtype, names in self._names.items():
            flat = self._flat[dtype] = torch.zeros_like(self._current(dtype))
            sizes = [model.get_buffer(name).numel() for name in names]
            for name, part in zip(names, flat.split(sizes), strict=True):
                self.buffers[name] = part.view(model.get_buffer(name).shape)
        self._kept: dict[str, torch.Tensor] = {}
        self._is_in_use = False
        self.num_updates = 0
        """How many updates it has taken in; without one there is no average yet."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return what holds the averages on this rank."""
        return [*self.values.values(), *self._flat.values()]

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move the average towards the weights, by `weight` of the way; the first time all of it."""
        current = {dtype: self._current(dtype) for dtype in self._flat}
        averages = self.tensors
        towards = [*self._weights().values(), *current.values()]
        if not averages:
            pass
        elif not self.num_updates:
            torch._foreach_copy_(averages, towards)
        elif self._is_exact:
            for average, tensor in zip(averages, towards, strict=True):
                lerp_exactly(average, tensor, weight)
        else:
            torch._foreach_lerp_(averages, towards, weight)
        for dtype, flat in self._flat.items():  # infinities, as in masks and in bounds yet to be found, have no average
            flat.copy_(flat.where(flat.isfinite(), current[dtype]))
        self.num_updates += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange weights and averages in place; again, to have everything as before."""
        for name, weight in self._weights().items():
            _exchange(weight, self.values[name])
        if not self._is_in_use:
            self._kept = {name: self._model.get_buffer(name).clone() for name in self.buffers}
        for name, value in (self._kept if self._is_in_use else self.buffers).items():
            self._model.get_buffer(name).copy_(value)
        self._is_in_use = not self._is_in_use
        if not self._is_in_use:
            self._kept = {}

    @torch.no_grad()
    def begin_restore(self, reader: StateReader) -> dict[str, TensorSpec]:
        """Return the saved average by name, for what is saved of it; the rest is set to the weights as they are now.

        A parameter without a saved average was frozen. Empty: the reader has none. Raises UserError for averages of
        other tensors.
        """
        specs = list(reader.specs())
        saved = {spec.name: spec for spec in specs if spec.section == EMA}
        shapes = {spec.name: spec.shape for spec in specs if spec.section == MODEL}
        others = [name for name, spec in saved.items() if shapes.get(name) != spec.shape]
        if others:
            raise UserError(f"the checkpoint has averages of tensors that the model does not have so: {some(others)}")
        if saved:
            for name, weight in self._weights().items():
                self.values[name].copy_(weight)
            for dtype, flat in self._flat.items():
                flat.copy_(self._current(dtype))
        return saved

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return this rank's shards, whose place in memory may change. To be called without gradients.

        So that to_local() costs nothing: detach() of many distributed tensors takes longer than an update.
        """
        return {name: t.to_local() if isinstance(t, DTensor) else t.data for name, t in self._trained.items()}

    def _current(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of all buffers whose average has this dtype, flat."""
        buffers = (self._model.get_buffer(name).detach() for name in self._names[dtype])  # modules may replace them
        return torch.cat([buffer.reshape(-1).to(dtype) for buffer in buffers])


def _dtype_of(buffer: torch.Tensor) -> torch.dtype:
    """Return the dtype of a buffer's average: bf16 has too few digits for small changes."""
    return torch.float64 if buffer.dtype == torch.float64 else torch.float32


def _exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange the values of two contiguous tensors of a shape, with memory for a piece of them."""
    for mine, its in zip(one.view(-1).split(_CHUNK), other.view(-1).split(_CHUNK), strict=True):
        kept = mine.clone()
        mine.copy_(its)
        its.copy_(kept)

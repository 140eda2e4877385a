"""Buffers such as batch-norm statistics: after a step, their mean over the step's micro-batches."""

import torch
from torch import nn

from shardlaunch.sharding.exact import summands
from shardlaunch.sharding.world import World


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers in the model's state dict by name; tied buffers appear once."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def non_persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that are not in the model's state dict; the constructor recomputes them at each start."""
    saved = persistent_buffers(model)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


class BufferMean:
    """Make buffer updates independent of how a step's micro-batches are spread over ranks.

    Each micro-batch starts from the same buffers. After the step, float buffers become the mean over the micro-batches;
    other buffers (counters) take their value after the first micro-batch. A buffer that no micro-batch changes keeps
    its value to the bit, whatever its dtype.
    """

    def __init__(self, replicas: list[nn.Module], *, world: World, exact: bool = False) -> None:
        """`exact`: no bit depends on the order of the sums."""
        self._world = world
        self._summands = summands if exact else torch.Tensor.double
        # Non-persistent buffers are left alone: the constructor recomputes them.
        buffers = persistent_buffers(replicas[0])
        self._floats = [name for name, buffer in buffers.items() if buffer.is_floating_point()]
        self._others = [name for name in buffers if name not in self._floats]
        self._num_others = sum(buffers[name].numel() for name in self._others)
        self._replicas = replicas
        self._start: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._first: torch.Tensor | None = None

    def begin_step(self) -> None:
        """Remember the buffers at the start of the step."""
        if self._floats or self._others:
            self._start = [buffer.clone() for buffer in self._of(self._replicas[0])]
            floats = self._start[: len(self._floats)]
            self._sums = [torch.zeros_like(self._summands(buffer)) for buffer in floats]
            self._first = None

    def end_micro_batch(self, model: nn.Module, *, index: int, weight: float) -> None:
        """Add the buffers after micro-batch `index` to the sums (unless its weight is 0), then reset them."""
        buffers = self._of(model)
        if weight:
            for start, total, buffer in zip(self._start, self._sums, buffers, strict=False):
                total.add_(self._summands(_summed(buffer.to(total.device), start)))
            if index == 0 and self._others:
                self._first = _flat(buffers[len(self._floats) :])
        for start, buffer in zip(self._start, buffers, strict=True):
            buffer.copy_(start)

    def end_step(self, *, num_micro_batches: int) -> None:
        """Set the buffers of all replicas on all ranks to the step's result. All ranks."""
        if not self._start:
            return
        flat = [total.reshape(-1) for total in self._sums]
        if self._others:
            first = self._first
            if first is None:  # another rank has run the first micro-batch
                first = torch.zeros(self._num_others, dtype=torch.int64, device=self._start[0].device)
            flat += [(first >> 32).double(), (first & 0xFFFFFFFF).double()]  # float64 does not hold all of int64
        total = self._world.sum_of_data(torch.cat(flat))
        if self._others:
            high, low = total[-2 * self._num_others :].long().chunk(2)
            others = (high << 32) + low
        for model in self._replicas:
            offset = other_offset = 0
            for start, buffer in zip(self._start, self._of(model), strict=True):
                if buffer.is_floating_point():
                    length = self._summands(buffer).numel()
                    sums = total[offset : offset + length].view(-1, *buffer.shape).sum(0)
                    result = sums / num_micro_batches
                    offset += length
                    buffer.copy_(start + result if buffer.dtype == torch.float64 else result)
                else:
                    buffer.copy_(others[other_offset : other_offset + buffer.numel()].view_as(buffer))
                    other_offset += buffer.numel()

    def _of(self, model: nn.Module) -> list[torch.Tensor]:
        # Looked up by name each time, since a module may replace its buffer tensor.
        return [model.get_buffer(name) for name in (*self._floats, *self._others)]


def _summed(buffer: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return what to sum of a float buffer: its value, which float64 sums exactly, or for float64 its change."""
    if buffer.dtype != torch.float64:
        return buffer
    return torch.where(buffer == start, 0.0, buffer - start)


def _flat(buffers: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([buffer.reshape(-1).long() for buffer in buffers])

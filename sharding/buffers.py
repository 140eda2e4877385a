"""Buffers such as batch-norm statistics: after a step, their mean over the step's micro-batches."""

import torch
from torch import nn

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
    other buffers (counters) take their value after the first micro-batch.
    """

    def __init__(self, replicas: list[nn.Module], *, world: World) -> None:
        self._world = world
        # Non-persistent buffers are left alone: the constructor recomputes them.
        self._names = list(persistent_buffers(replicas[0]))
        self._replicas = replicas
        self._start: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []

    def begin_step(self) -> None:
        """Remember the buffers at the start of the step."""
        if self._names:
            self._start = [buffer.clone() for buffer in self._of(self._replicas[0])]
            self._sums = [torch.zeros(b.shape, dtype=torch.float64, device=b.device) for b in self._start]

    def end_micro_batch(self, model: nn.Module, *, index: int, weight: float) -> None:
        """Add the buffers after micro-batch `index` to the sums (unless its weight is 0), then reset them."""
        for start, total, buffer in zip(self._start, self._sums, self._of(model), strict=True):
            if weight and (start.is_floating_point() or index == 0):
                total.add_(buffer.to(total.device))
            buffer.copy_(start)

    def end_step(self, *, num_micro_batches: int) -> None:
        """Set the buffers of all replicas on all ranks to the step's result. All ranks."""
        if not self._names:
            return
        flat = self._world.sum(torch.cat([total.reshape(-1) for total in self._sums]))
        for model in self._replicas:
            offset = 0
            for buffer in self._of(model):
                result = flat[offset : offset + buffer.numel()].view_as(buffer).to(buffer.device)
                buffer.copy_(result / num_micro_batches if buffer.is_floating_point() else result)
                offset += buffer.numel()

    def _of(self, model: nn.Module) -> list[torch.Tensor]:
        # Looked up by name each time, since a module may replace its buffer tensor.
        return [model.get_buffer(name) for name in self._names]

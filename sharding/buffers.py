"""Buffers such as batch-norm statistics: after a step, the mean of what the step's micro-batches made of them."""

import torch
from torch import nn

from shardlaunch.sharding.world import World


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to the model's state, by name, tied ones once."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def non_persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that do not belong to the model's state: its constructor makes them, each time it is built."""
    saved = persistent_buffers(model)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


class BufferMean:
    """Make the buffers after a step independent of how its micro-batches are spread over ranks.

    Each micro-batch starts from the step's buffers. Float buffers then become the mean over the micro-batches, others
    (counters) what the first micro-batch made of them.
    """

    def __init__(self, replicas: list[nn.Module], *, world: World) -> None:
        self._world = world
        # Only what the model's state holds: the constructor makes the others anew each time.
        self._names = list(persistent_buffers(replicas[0]))
        self._replicas = replicas
        self._start: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []

    def begin_step(self) -> None:
        """Remember the step's buffers."""
        if self._names:
            self._start = [buffer.clone() for buffer in self._of(self._replicas[0])]
            self._sums = [torch.zeros(b.shape, dtype=torch.float64, device=b.device) for b in self._start]

    def end_micro_batch(self, model: nn.Module, *, index: int, weight: float) -> None:
        """Take what micro-batch `index` made of the buffers (unless its weight is zero) and set them back."""
        for start, total, buffer in zip(self._start, self._sums, self._of(model), strict=True):
            if weight and (start.is_floating_point() or index == 0):
                total.add_(buffer.to(total.device))
            buffer.copy_(start)

    def end_step(self, *, num_micro_batches: int) -> None:
        """Set the buffers of all replicas on all ranks to the step's outcome. All ranks."""
        if not self._names:
            return
        flat = self._world.sum(torch.cat([total.reshape(-1) for total in self._sums]))
        for model in self._replicas:
            offset = 0
            for buffer in self._of(model):
                outcome = flat[offset : offset + buffer.numel()].view_as(buffer).to(buffer.device)
                buffer.copy_(outcome / num_micro_batches if buffer.is_floating_point() else outcome)
                offset += buffer.numel()

    def _of(self, model: nn.Module) -> list[torch.Tensor]:
        # By name each time, for a module may have put a new tensor in the place of the old one.
        return [model.get_buffer(name) for name in self._names]

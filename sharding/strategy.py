"""What every strategy offers. The trainer knows this and nothing else about how a model is spread."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import nn

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.sharding.world import World

BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class Strategy(Protocol):
    """Spread a model and its optimizer, run backward passes, hand out state and take it back.

    A step: for each slot a forward pass of `replicas[slot % len(replicas)]` and `backward(...)`; then, once,
    `finish_gradients(...)`; then `update()` or, to skip the step, `discard()`.
    """

    optimizer: torch.optim.Optimizer
    replicas: list[nn.Module]

    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate `factor` times the gradient of one micro-batch; `last` ends the accumulation. All ranks."""
        ...

    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Sum over ranks, multiply by `unscale`, clip to `max_norm` (0: not), return the norm before. All ranks."""
        ...

    def update(self) -> None:
        """Apply the optimizer and drop the gradients. All ranks."""
        ...

    def discard(self) -> None:
        """Drop the gradients without an update. All ranks."""
        ...

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's pieces of weights, persistent buffers and optimizer entries. All ranks."""
        ...

    def restore(self, reader: StateReader) -> None:
        """Take the state back, reading just this rank's pieces. All ranks."""
        ...


class BuildStrategy(Protocol):
    """Build a strategy around a model that is on the CPU and equal on all ranks. All ranks."""

    def __call__(self, model: nn.Module, build_optimizer: BuildOptimizer, *, world: World) -> Strategy: ...

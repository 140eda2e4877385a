"""What every strategy offers. The trainer knows this and nothing else about how a model is spread."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.sharding.world import World

BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold how a model is to be spread; a strategy takes what concerns it. Nothing but the dtype changes the run."""

    compute_dtype: torch.dtype = torch.float32
    """What forward passes compute in, by autocast; a strategy that gathers parameters may gather them in it."""
    layer_classes: tuple[str, ...] = ()
    """Classes of the modules that are gathered as one; empty: what the model itself declares."""
    reshard_after_forward: bool = True
    """Drop gathered parameters after the forward pass and gather them again in the backward pass."""
    cpu_offload: bool = False
    """Keep a rank's share of parameters and optimizer state in host memory."""
    shard_ranks: int = 0
    """Ranks that share one copy of the model, where there are several copies; 0: those of a machine, of one half."""


DEFAULT_SETTINGS = Settings()
ONE_RANK = "one rank: nothing is sharded"


class Strategy(ABC):
    """Spread a model and its optimizer, run backward passes, hand out state and take it back.

    A step: for each slot a forward pass of `replicas[slot % len(replicas)]` and `backward(...)`; then, once,
    `finish_gradients(...)`; then `update()` or, to skip the step, `discard()`.
    """

    for_one_process: ClassVar[bool] = False
    least_ranks: ClassVar[int] = 1
    """Ranks that the strategy needs if there are several; one rank alone runs under any strategy."""
    is_sharded: ClassVar[bool] = True
    """Each rank keeps a part of the state only."""
    starts_empty: ClassVar[bool] = False
    """The model is built with parameters on the meta device; `restore` gives them values, also at the start of a run.

    Other strategies are given a model on the CPU that is equal on all ranks.
    """

    optimizer: torch.optim.Optimizer
    """The learning rates of its parameter groups may be set before each update."""
    replicas: list[nn.Module]
    devices: list[torch.device]
    """What each replica computes on."""

    @abstractmethod
    def __init__(
        self, model: nn.Module, build_optimizer: BuildOptimizer, *, world: World, settings: Settings = DEFAULT_SETTINGS
    ) -> None:
        """Take `model` over and build its optimizer. All ranks. Raises UserError when they cannot be spread."""

    @classmethod  # noqa: B027 - most strategies need nothing
    def check_available(cls) -> None:
        """Raise UserError when something that the strategy needs is not installed."""

    def describe(self) -> str:
        """Return what a person should know of it on this machine; empty: nothing."""
        return ""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate `factor` times the gradient of one micro-batch; `last` ends the accumulation. All ranks."""

    @abstractmethod
    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Sum over ranks, multiply by `unscale`, clip to `max_norm` (0: not), return the norm before. All ranks.

        A parameter that no loss has reached since the last update has a zero gradient.
        """

    @abstractmethod
    def optimizer_step(self) -> None:
        """Apply the optimizer and drop the gradients. All ranks."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients without an update. All ranks."""

    @abstractmethod
    def state(self) -> Iterator[Fragment]:
        """Yield this rank's piece of every weight, persistent buffer and optimizer entry. All ranks.

        Every rank yields the same tensors in the same order; where it has no part of one, an empty piece.
        """

    @abstractmethod
    def restore(self, reader: StateReader) -> None:
        """Take the state back, reading just this rank's pieces. All ranks, each reading the same tensors in turn.

        A reader without optimizer entries (the weights at the start of a run) leaves the optimizer as built.
        """

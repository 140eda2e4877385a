"""The interface of every strategy: all that the trainer knows about how a model is spread over ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.sharding.averages import Average
from shardlaunch.sharding.world import World

BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a strategy, each used by those that it concerns. Only dtype and exact sums change results."""

    compute_dtype: torch.dtype = torch.float32
    """Autocast dtype of the forward pass; a strategy that gathers parameters may gather them in it."""
    layer_classes: tuple[str, ...] = ()
    """Classes of the modules that are gathered as a unit; empty: those that the model declares."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass and gather them again in the backward pass."""
    cpu_offload: bool = False
    """Keep the shards of parameters and optimizer state in host memory."""
    shard_ranks: int = 0
    """Ranks that one replica is sharded over (hsdp); 0: those of one machine, or half of a single machine's."""
    exact: bool = False
    """Sum so that no bit depends on the number of ranks."""


DEFAULT_SETTINGS = Settings()
ONE_RANK = "one rank: nothing is sharded"


class Strategy(ABC):
    """Spread a model and its optimizer over the ranks, run backward passes, save and restore state.

    An update, within `updating(...)`: for each slot a forward pass of `replicas[slot % len(replicas)]` and
    `backward(...)`; then `finish_gradients(...)`; then `optimizer_step()` or, to skip the update, `discard()`.
    """

    for_one_process: ClassVar[bool] = False
    least_ranks: ClassVar[int] = 1
    """Ranks that the strategy needs if there are several; one rank alone runs under any strategy."""
    is_sharded: ClassVar[bool] = True
    """Each rank keeps only its shards of the state."""
    gathers_weights: ClassVar[bool] = False
    """Weights are gathered as modules run, so that this is hidden behind all of the computing."""
    can_be_exact: ClassVar[bool] = False
    """It can sum so that no bit depends on the ranks (`Settings.exact`)."""
    is_choice_of_one_rank: ClassVar[bool] = False
    """One rank alone may run under it for its own sake, so that a plan for one rank compares it with others."""
    planned_as: ClassVar[str] = ""
    """The strategy that keeps on one device, in one process, what this one keeps on each."""
    takes_several_optimizers: ClassVar[bool] = False
    """Its optimizer may be several (`Optimizers`), of which an update is one's."""
    differentiates_twice: ClassVar[bool] = True
    """A loss may contain gradients (`keeping_graph`)."""
    starts_empty: ClassVar[bool] = False
    """The model is built with its parameters on the meta device; `restore` fills them, also at the start of a run.

    Other strategies get a model on the CPU that is identical on all ranks.
    """

    optimizer: torch.optim.Optimizer
    """The caller may set the learning rates of its parameter groups before each update."""
    replicas: list[nn.Module]
    devices: list[torch.device]
    """The device of each replica."""
    average: Average | None = None
    """The average of the weights that the run keeps (`keep_average`)."""

    @abstractmethod
    def __init__(
        self, model: nn.Module, build_optimizer: BuildOptimizer, *, world: World, settings: Settings = DEFAULT_SETTINGS
    ) -> None:
        """Take over `model` and build its optimizer. All ranks. Raises UserError when one of them is not supported."""

    @classmethod  # noqa: B027 - most strategies need nothing
    def check_available(cls) -> None:
        """Raise UserError when a package that the strategy needs is not installed."""

    def describe(self) -> str:
        """Return details for the start-up summary, or an empty string."""
        return ""

    def updating(self, name: str) -> AbstractContextManager[None]:
        """Let gradients, norm and update be those of one of several optimizers, by name, and of its parameters.

        Others need no gradient within. All ranks.
        """
        assert not name, "there is one optimizer"
        return nullcontext()

    def keeping_graph(self) -> AbstractContextManager[None]:
        """Let a backward pass be differentiated again: within, it leaves gradients and weights where they are."""
        assert self.differentiates_twice
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate `factor` times the gradient of one micro-batch; `last` ends the accumulation. All ranks."""

    def must_repeat(self) -> bool:
        """Return whether the step's micro-batches must be run again, since exact sums need other units. All ranks.

        To be asked before `finish_gradients`.
        """
        return False

    @property
    def exact_exponents(self) -> dict[str, int]:
        """The units of exact sums by parameter, which a resume needs; empty without exact sums."""
        return {}

    @exact_exponents.setter  # noqa: B027 - most strategies have none
    def exact_exponents(self, saved: dict[str, int]) -> None:
        pass

    @abstractmethod
    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Sum over ranks, multiply by `unscale`, clip to `max_norm` (0: off), return the unclipped norm. All ranks.

        A parameter that the loss has not reached since the last update has a zero gradient.
        """

    @abstractmethod
    def optimizer_step(self) -> None:
        """Apply the optimizer and drop the gradients. All ranks."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients without an update. All ranks."""

    @abstractmethod
    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return what the optimizer changes: trained parameters by name, or what takes their place by names of its own.

        Plain tensors or distributed ones, contiguous.
        """

    def keep_average(self, *, is_exact: bool = False) -> None:
        """Keep an average of the trained weights from now on, which state and restore include. Before `restore`."""
        self.average = Average(self.replicas[0], self.trained_tensors(), is_exact=is_exact)

    def exchange_average(self) -> None:
        """Exchange weights and average in place: the model computes with the average, or again as before. All ranks.

        There is no step, state or restore in between.
        """
        assert self.average is not None
        self.average.exchange()

    @abstractmethod
    def state(self) -> Iterator[Fragment]:
        """Yield this rank's shard of every weight, persistent buffer, optimizer entry and average. All ranks.

        Every rank yields the same tensors in the same order, with an empty shard where it holds nothing.
        """

    @abstractmethod
    def restore(self, reader: StateReader) -> None:
        """Restore the state, reading only this rank's shards. All ranks, reading the same tensors in the same order.

        A reader without optimizer entries (initial weights) leaves the optimizer as built. Of an average, the caller
        restores the number of its updates.
        """

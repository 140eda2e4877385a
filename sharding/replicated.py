"""The full model on every rank: a single device, or distributed data parallel (DDP) over several."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.sharding.exact import ExactGradients
from shardlaunch.sharding.exact_step import step_exactly
from shardlaunch.sharding.gradients import GradientBuckets, clip_factor
from shardlaunch.sharding.layers import check_gradient_hooks
from shardlaunch.sharding.named_state import check_optimizer, named_state, restore_named_state, trained_by
from shardlaunch.sharding.optimizers import Optimizers, only_needing_gradients, optimizers_by_name
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, BuildOptimizer, Settings, Strategy
from shardlaunch.sharding.world import World


class Replicated(Strategy):
    """Keep one full replica per rank; the ranks sum their gradients (see `Strategy`)."""

    is_sharded = False
    can_be_exact = True
    takes_several_optimizers = True

    def __init__(
        self, model: nn.Module, build_optimizer: BuildOptimizer, *, world: World, settings: Settings = DEFAULT_SETTINGS
    ) -> None:
        check_gradient_hooks(model)
        make_contiguous(model)
        self.model = model.to(world.device)
        self.replicas = [self.model]
        self.devices = [world.device]
        self._trained = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self.optimizer = build_optimizer(list(self._trained.items()))
        check_optimizer(self.model, self.optimizer)
        self.world = world
        self.gradients: GradientBuckets | ExactGradients
        self._buckets: dict[str, GradientBuckets] = {}
        if settings.exact:
            assert not isinstance(self.optimizer, Optimizers)
            self.gradients = ExactGradients(dict(self.model.named_parameters()), world=world)
        else:
            for name, optimizer in optimizers_by_name(self.optimizer).items():
                self._buckets[name] = GradientBuckets(trained_by(optimizer, self._trained.values()), world=world)
            self.gradients = next(iter(self._buckets.values()))
        self._updated = self.optimizer

    def describe(self) -> str:
        """Say so when there is nothing to sum."""
        return "one rank: no gradients to sum" if self.world.size == 1 else ""

    @contextmanager
    def updating(self, name: str) -> Iterator[None]:
        """Sum the gradients of this optimizer's parameters alone."""
        if not isinstance(self.optimizer, Optimizers):  # nothing to choose, in each step
            yield
            return
        self._updated, self.gradients = self.optimizer.by_name[name], self._buckets[name]
        trained = self._trained.values()
        with only_needing_gradients(trained_by(self._updated, trained), trained):
            yield

    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate; on the last micro-batch, sum each bucket over the ranks as soon as it is complete."""
        if last:
            self.gradients.arm()
        loss.backward(torch.full_like(loss, factor))

    def must_repeat(self) -> bool:
        """Ask the exact sums."""
        return isinstance(self.gradients, ExactGradients) and self.gradients.must_repeat()

    @property
    def exact_exponents(self) -> dict[str, int]:
        """The units of exact sums by parameter."""
        return self.gradients.units.exponents if isinstance(self.gradients, ExactGradients) else {}

    @exact_exponents.setter
    def exact_exponents(self, saved: dict[str, int]) -> None:
        if isinstance(self.gradients, ExactGradients):
            self.gradients.units.exponents = saved

    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Wait for the sums, then unscale and clip in one multiplication."""
        self.gradients.finish()
        norm = self.gradients.norm() * unscale
        self.gradients.scale(unscale * clip_factor(norm, max_norm=max_norm))
        return norm

    def optimizer_step(self) -> None:
        """Apply the optimizer."""
        if isinstance(self.gradients, ExactGradients):
            step_exactly(self._updated)
        else:
            self._updated.step()
        self.gradients.zero()

    def discard(self) -> None:
        """Drop the gradients."""
        self.gradients.zero()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters."""
        return dict(self._trained)

    def state(self) -> Iterator[Fragment]:
        """Yield the full state: every rank has all of it."""
        return named_state(self.model, self.optimizer, self.average)

    def restore(self, reader: StateReader) -> None:
        """Read the full state."""
        restore_named_state(self.model, self.optimizer, reader, self.average)


@torch.no_grad()
def make_contiguous(model: nn.Module) -> None:
    """Lay the parameters out in the order of their elements, as gradients and a checkpoint's values are.

    Fused optimizers go by the order in memory: with parameters in another one, such as channels_last, they would be
    wrong.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


class Single(Replicated):
    """Train one replica on one device."""

    for_one_process = True
    is_choice_of_one_rank = True

    def describe(self) -> str:
        """Return a hint when there are unused GPUs."""
        num_gpus = torch.cuda.device_count() if self.devices[0].type == "cuda" else 0
        return (
            f"1 of {num_gpus} GPUs; to use all: `shardlaunch run RECIPE` or `accelerate launch`" if num_gpus > 1 else ""
        )

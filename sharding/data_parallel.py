"""DataParallel: one process, one replica of the model per GPU, one whole micro-batch per replica.

torch's nn.DataParallel splits a micro-batch over the GPUs, which changes its padding, batch statistics and dropout
masks. Here each replica runs whole micro-batches, so the results stay the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy

import torch
from torch import nn

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.errors import UserError
from shardlaunch.sharding.gradients import GradientBuckets
from shardlaunch.sharding.optimizers import Optimizers
from shardlaunch.sharding.replicated import Replicated, make_contiguous
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, BuildOptimizer, Settings, Strategy
from shardlaunch.sharding.world import World


class DataParallel(Strategy):
    """Run micro-batches on all devices of one process (see `Strategy`). On CPU there is a single replica.

    Kernels are launched on one replica after another without waiting, so that the devices compute concurrently.
    """

    for_one_process = True
    is_sharded = False
    can_be_exact = True
    takes_several_optimizers = True
    planned_as = "single"

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: BuildOptimizer,
        *,
        world: World,
        settings: Settings = DEFAULT_SETTINGS,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        assert world.size == 1, "DataParallel runs in one process"
        if devices is None:
            cuda = world.device.type == "cuda"
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if cuda else [world.device]
        if settings.exact and len(devices) > 1:
            raise UserError("--exact: not under dp on several GPUs; use --strategy ddp")
        make_contiguous(model)
        self._copies = [deepcopy(model).to(device) for device in devices[1:]]
        self._main = Replicated(model, build_optimizer, world=world, settings=settings)
        if self._copies and isinstance(self._main.optimizer, Optimizers):
            raise UserError("several optimizers: not under dp on several GPUs; use --strategy ddp")
        self._copied_gradients = [GradientBuckets(copy.parameters(), world=world) for copy in self._copies]
        self.optimizer = self._main.optimizer
        self.replicas: list[nn.Module] = [self._main.model, *self._copies]
        self.devices = list(devices)

    def describe(self) -> str:
        """Return the number of replicas."""
        on_cpu = " (on CPU there is only one)" if self.devices[0].type == "cpu" else ""
        return f"{len(self.replicas)} replica{'s' if len(self.replicas) > 1 else ''} in one process{on_cpu}"

    def updating(self, name: str) -> AbstractContextManager[None]:
        """Update the first replica."""
        return self._main.updating(name)

    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate on the replica that computed the loss."""
        self._main.backward(loss, factor=factor, last=last)

    def must_repeat(self) -> bool:
        """Ask the exact sums."""
        return self._main.must_repeat()

    @property
    def exact_exponents(self) -> dict[str, int]:
        """The units of exact sums by parameter."""
        return self._main.exact_exponents

    @exact_exponents.setter
    def exact_exponents(self, saved: dict[str, int]) -> None:
        self._main.exact_exponents = saved

    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Sum the replicas' gradients onto the first."""
        for gradients in self._copied_gradients:
            assert isinstance(self._main.gradients, GradientBuckets), "exact sums are for one replica"
            for bucket, copied in zip(self._main.gradients.flat, gradients.flat, strict=True):
                bucket.add_(copied.to(bucket.device))
        return self._main.finish_gradients(unscale=unscale, max_norm=max_norm)

    def optimizer_step(self) -> None:
        """Apply the optimizer on the first replica and copy its weights to the others."""
        self._main.optimizer_step()
        self._drop_copied_gradients()
        self._copy_to_others()

    def discard(self) -> None:
        """Drop the gradients."""
        self._main.discard()
        self._drop_copied_gradients()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return the first replica's trained parameters."""
        return self._main.trained_tensors()

    def keep_average(self, *, is_exact: bool = False) -> None:
        """Let the first replica keep it, which evaluates."""
        self._main.keep_average(is_exact=is_exact)
        self.average = self._main.average

    def state(self) -> Iterator[Fragment]:
        """Yield the first replica's state; the others are copies of it."""
        return self._main.state()

    def restore(self, reader: StateReader) -> None:
        """Restore the first replica and copy its weights and buffers to the others."""
        self._main.restore(reader)
        self._copy_to_others()

    def _drop_copied_gradients(self) -> None:
        for gradients in self._copied_gradients:
            gradients.zero()

    @torch.no_grad()
    def _copy_to_others(self) -> None:
        for copy in self._copies:
            pairs = zip(_tensors(self._main.model), _tensors(copy), strict=True)
            for mine, theirs in pairs:
                theirs.copy_(mine, non_blocking=True)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()

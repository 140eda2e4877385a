"""Gradients as views of flat buckets, summed over the ranks in a layout that depends only on the model.

torch's DistributedDataParallel rebuilds its buckets in the order of the first backward pass, so a resumed process sums
in a different order. Here the buckets always follow the registration order. The flat buffers are zeroed each step, so a
parameter that the loss does not reach has a zero gradient.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.sharding.world import World

BUCKET_BYTES = 25 << 20


class GradientBuckets:
    """Own the gradients of `parameters`: accumulate in place, sum over the ranks, compute the norm, scale.

    The buckets are filled from the last parameter to the first, in the order of the backward pass, so that on the last
    micro-batch each bucket is all-reduced while the pass continues.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._world = world
        self._buckets: list[torch.Tensor] = []
        self._sizes: list[int] = []  # number of parameters in each bucket
        self._missing: list[int] = []  # how many of them the armed backward pass has not reached yet
        self._sums: list[dist.Work] = []
        self._armed = False
        for group in grouped(reversed([p for p in parameters if p.requires_grad]), bucket_bytes):
            flat = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype, device=group[0].device)
            offset = 0
            for parameter in group:
                parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()
                if world.size > 1:
                    parameter.register_post_accumulate_grad_hook(self._hook(len(self._buckets)))
            self._buckets.append(flat)
            self._sizes.append(len(group))

    @property
    def flat(self) -> list[torch.Tensor]:
        """Return the flat gradients, bucket by bucket."""
        return self._buckets

    def zero(self) -> None:
        """Set all gradients to zero."""
        for bucket in self._buckets:
            bucket.zero_()

    def arm(self) -> None:
        """Sum the buckets as they fill during the next backward pass, which is the step's last. All ranks."""
        if self._world.size > 1:
            self._missing = list(self._sizes)
            self._armed = True

    def finish(self) -> None:
        """Sum the buckets that the backward pass did not fill, and wait for all sums. All ranks."""
        if self._world.size > 1:
            while len(self._sums) < len(self._buckets):
                self._sum_next()
            for work in self._sums:
                work.wait()
            self._sums.clear()
            self._armed = False

    def norm(self) -> float:
        """Return the 2-norm of all gradients."""
        return math.sqrt(sum(torch.linalg.vector_norm(bucket).item() ** 2 for bucket in self._buckets))

    def scale(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""
        if factor != 1.0:
            for bucket in self._buckets:
                bucket.mul_(factor)

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def reached(_: torch.Tensor) -> None:
            if self._armed:
                if index < len(self._sums):
                    raise reached_again()
                self._missing[index] -= 1
                # In bucket order: collectives must start in the same order on all ranks.
                while len(self._sums) < len(self._buckets) and self._missing[len(self._sums)] == 0:
                    self._sum_next()

        return reached

    def _sum_next(self) -> None:
        work = dist.all_reduce(self._buckets[len(self._sums)], async_op=True)
        assert work is not None
        self._sums.append(work)


def reached_again() -> UserError:
    """Return the error for a gradient that has changed after it was summed."""
    return UserError(
        "a backward pass reached a parameter again after its gradient was summed over the ranks; with activation "
        "checkpointing, set use_reentrant=False"
    )


def clip_factor(norm: float, *, max_norm: float) -> float:
    """Return the factor that clips gradients of this norm to `max_norm` (0: no clipping)."""
    return max_norm / norm if 0 < max_norm < norm else 1.0


def grouped(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> Iterable[list[nn.Parameter]]:
    """Yield groups of parameters of one dtype and device, of at most `bucket_bytes` each (or a single parameter)."""
    group: list[nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        is_alike = not group or (group[0].dtype, group[0].device) == (parameter.dtype, parameter.device)
        if group and (not is_alike or num_bytes + size > bucket_bytes):
            yield group
            group, num_bytes = [], 0
        group.append(parameter)
        num_bytes += size
    if group:
        yield group

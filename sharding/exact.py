"""Sums that have the same bits in any order, over micro-batches and over ranks.

A number is rounded to a multiple of a power of two that is known before, and the multiples are added as integers, or
as float64 where they are few enough bits: no addition rounds, so none depends on the order. The gradients of a
parameter have a power of two of their own, after the largest one of the last step; where a larger one does not fit, the
step is run again. (Fixed-point accumulators: U. Kulisch; reproducible sums: J. Demmel and H. D. Nguyen, 2013.)
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.sharding.gradients import BUCKET_BYTES, grouped
from shardlaunch.sharding.world import World

MOST_SUMMANDS = 4096
"""Micro-batches per step: each has 51 bits of the 63 of a sum."""
_BITS = 51
_HEADROOM = 6  # bits by which a gradient may grow from one step to the next
_UNKNOWN = -1000  # an exponent that fits no gradient
_CHUNK = 1 << 16  # elements that stay in the cache between the operations on them
_SIGNIFICANT = 1.5 * 2.0**52  # in float64, adding this times a power of two rounds to multiples of it
_UNITS = (2.0**-20, 2.0**-50, 2.0**-80)
NUM_PARTS = len(_UNITS)


def summands(values: torch.Tensor) -> torch.Tensor:
    """Return three float64 tensors, stacked, whose sums over tensors are exact; added together they are the values.

    They have multiples of 2^-20, 2^-50 and 2^-80; what is smaller is rounded. For up to 2^24 tensors, with magnitudes
    below 2^33 in total. NaN and infinities stay what they are.
    """
    rest = values.double()
    parts = []
    for unit in _UNITS:
        parts.append(_rounded(rest, unit))
        rest = (rest - parts[-1]).where(values.isfinite(), 0.0)
    return torch.stack(parts)


def _rounded(values: torch.Tensor, unit: float) -> torch.Tensor:
    return values + _SIGNIFICANT * unit - _SIGNIFICANT * unit


class ExactGradients:
    """Gradients of whole parameters as `GradientBuckets` has them, with sums that have the same bits on any ranks.

    A sum differs from the real one by at most the number of micro-batches times 2^-44 of the parameter's largest
    gradient in this step or the last.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, world: World) -> None:
        self._world = world
        self._armed = False
        self._works: list[dist.Work] = []
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self._names = list(reversed(trained))
        self._parameters = [trained[name] for name in self._names]
        self._exponents = [_UNKNOWN] * len(self._names)
        self._largest = torch.zeros(len(self._names), dtype=torch.float64)
        self._sums: list[torch.Tensor] = []  # of multiples, bucket by bucket
        self._gradients: list[torch.Tensor] = []
        self._sizes: list[int] = []
        self._missing: list[int] = []
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each parameter: its multiples, its gradient
        for group in grouped(self._parameters, BUCKET_BYTES):
            sums = torch.zeros(sum(p.numel() for p in group), dtype=torch.int64)
            gradients = torch.zeros(len(sums), dtype=group[0].dtype)
            offset = 0
            for parameter in group:
                place = slice(offset, offset := offset + parameter.numel())
                hook = self._hook(len(self._views), len(self._sums))
                parameter.register_post_accumulate_grad_hook(hook)
                self._views.append((sums[place], gradients[place]))
            self._sums.append(sums)
            self._gradients.append(gradients)
            self._sizes.append(len(group))

    @property
    def exponents(self) -> dict[str, int]:
        """The exponent of the unit of each parameter, which a resume needs."""
        return dict(zip(self._names, self._exponents, strict=True))

    @exponents.setter
    def exponents(self, saved: Mapping[str, int]) -> None:
        self._exponents = [saved.get(name, _UNKNOWN) for name in self._names]

    def zero(self) -> None:
        """Drop all gradients and sums."""
        self._largest.zero_()
        for sums in self._sums:
            sums.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def arm(self) -> None:
        """Sum the buckets over the ranks as they fill during the next backward pass. All ranks."""
        self._armed, self._missing = True, list(self._sizes)

    def must_repeat(self) -> bool:
        """Wait for the sums; return whether the step must be run again, with other units. All ranks."""
        while len(self._works) < len(self._sums) and self._world.size > 1:
            self._sum_next()
        for work in self._works:
            work.wait()
        self._works.clear()
        self._armed = False
        if self._world.size > 1:
            dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)
        needed = [_needed_exponent(largest) for largest in self._largest.tolist()]
        if math.inf in needed:
            return False  # the step is bad
        is_too_small = [need > exponent for need, exponent in zip(needed, self._exponents, strict=True)]
        for number, need in enumerate(needed):
            if is_too_small[number]:
                self._exponents[number] = int(need) + _HEADROOM
        if any(is_too_small):
            self.zero()
        return any(is_too_small)

    def finish(self) -> None:
        """Turn the sums into gradients, and choose the units of the next step."""
        for number, parameter in enumerate(self._parameters):
            sums, gradient = self._views[number]
            unit = math.ldexp(1.0, self._exponents[number])
            for multiples, part in zip(sums.split(_CHUNK), gradient.split(_CHUNK), strict=True):
                part.copy_(multiples.double().mul_(unit))
            parameter.grad = gradient.view_as(parameter)
            largest = float(self._largest[number])
            if math.isinf(largest):
                gradient.fill_(math.nan)
            elif largest:
                self._exponents[number] = int(_needed_exponent(largest)) + _HEADROOM

    def norm(self) -> float:
        """Return the 2-norm of all gradients."""
        return math.sqrt(sum(torch.linalg.vector_norm(bucket).item() ** 2 for bucket in self._gradients))

    def scale(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""
        if factor != 1.0:
            for bucket in self._gradients:
                bucket.mul_(factor)

    def _hook(self, number: int, bucket: int) -> Callable[[torch.Tensor], None]:
        def reached(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            self._add(number, gradient.reshape(-1))
            if self._armed and self._world.size > 1:
                assert bucket >= len(self._works), "a gradient changed after it was summed over the ranks"
                self._missing[bucket] -= 1
                while len(self._works) < len(self._sums) and self._missing[len(self._works)] == 0:
                    self._sum_next()

        return reached

    def _add(self, number: int, gradient: torch.Tensor) -> None:
        """Add a gradient to a parameter's sum, as multiples of its unit."""
        offset = torch.tensor([_SIGNIFICANT * math.ldexp(1.0, self._exponents[number])], dtype=torch.float64)
        bits = int(offset.view(torch.int64))
        for sums, part in zip(self._views[number][0].split(_CHUNK), gradient.split(_CHUNK), strict=True):
            # The multiples are the last bits of the sum with the offset.
            sums.add_((part + offset).view(torch.int64).sub_(bits))
        largest = float(torch.linalg.vector_norm(gradient, math.inf)) if len(gradient) else 0.0
        self._largest[number] = max(float(self._largest[number]), largest if math.isfinite(largest) else math.inf)

    def _sum_next(self) -> None:
        work = dist.all_reduce(self._sums[len(self._works)], async_op=True)
        assert work is not None
        self._works.append(work)


def _needed_exponent(largest: float) -> float:
    """Return the exponent of the least unit of which a number is few enough multiples; infinity if none is."""
    if math.isinf(largest):
        return math.inf
    return math.frexp(largest)[1] - _BITS + 1 if largest else _UNKNOWN

"""Sums that have the same bits in any order, over micro-batches and over ranks.

A number is rounded to a multiple of a power of two that is known before, and the multiples are added as integers, or
as float64 where they are few enough bits: no addition rounds, so none depends on the order. The gradients of a
parameter have a power of two of their own, after the largest one of the last step; where a larger one does not fit, the
step is run again. (Fixed-point accumulators: U. Kulisch; reproducible sums: J. Demmel and H. D. Nguyen, 2013.)
"""

import math
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.sharding.gradients import BUCKET_BYTES, grouped, reached_again
from shardlaunch.sharding.world import World

MOST_SUMMANDS = 4096
"""Micro-batches per step: each has 51 bits of the 63 of a sum."""
_BITS = 51
_HEADROOM = 6  # bits by which a gradient may grow from one step to the next
_UNKNOWN = -1000  # an exponent that fits no gradient
_CHUNK = 1 << 17  # elements that stay in the cache between the operations on them
_GPU_CHUNK = 1 << 24  # enough to keep a GPU busy, with little memory for what is between the operations
_SIGNIFICANT = 1.5 * 2.0**52  # in float64, adding this times a power of two rounds to multiples of it
_UNITS = (2.0**-20, 2.0**-50, 2.0**-80)
NUM_PARTS = len(_UNITS)
_SQUARE_BITS = 45  # of a square from 0 to 1: the sum of those of a chunk has at most 63
_LOW_BITS = 40  # of a sum of squares, in the lower of the two numbers that ranks exchange


def summands(values: torch.Tensor, units: Sequence[float] = _UNITS) -> torch.Tensor:
    """Return float64 tensors, stacked, whose sums over tensors are exact; added together they are the values.

    They have multiples of the units, 2^-20, 2^-50 and 2^-80; what is smaller is rounded. For up to 2^24 tensors, with
    magnitudes below 2^53 of the first unit, 2^33, in total. NaN and infinities stay what they are.
    """
    rest = values.double()
    parts = []
    for unit in units:
        parts.append(rest + _SIGNIFICANT * unit - _SIGNIFICANT * unit)
        rest = (rest - parts[-1]).where(values.isfinite(), 0.0)
    return torch.stack(parts)


class Units:
    """The units of which the gradients of parameters are multiples: a power of two each, the same on all ranks."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._exponents = [_UNKNOWN] * len(names)
        self._largest = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._bad: set[int] = set()

    @property
    def exponents(self) -> dict[str, int]:
        """The exponent of each unit by parameter, which a resume needs."""
        return dict(zip(self._names, self._exponents, strict=True))

    @exponents.setter
    def exponents(self, saved: Mapping[str, int]) -> None:
        self._exponents = [saved.get(name, _UNKNOWN) for name in self._names]

    def of(self, number: int) -> float:
        """Return the unit of a parameter."""
        return math.ldexp(1.0, self._exponents[number])

    def add_multiples(self, number: int, gradient: torch.Tensor, sums: torch.Tensor, *, is_first: bool) -> None:
        """Add a flat gradient of a parameter to integer sums, in multiples of its unit; `is_first`: set the sums."""
        offset = _SIGNIFICANT * self.of(number)
        bits = _bits_of(offset)
        scratch = _scratch(gradient, 0 if is_first else len(gradient))
        size = _chunk_size(gradient)
        for total, part in zip(sums.split(size), gradient.split(size), strict=True):
            # The multiples are the last bits of the sum with the offset.
            near = total.view(torch.float64) if is_first else scratch[: len(part)]
            multiples = near.copy_(part).add_(offset).view(torch.int64).sub_(bits)
            if not is_first:
                total.add_(multiples)
        torch.maximum(self._largest[number], _largest(gradient), out=self._largest[number])

    def must_change(self, world: World) -> bool:
        """Return whether a unit was too small for a gradient of any rank; it is larger then. All ranks."""
        if world.size > 1:
            dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)
        all_largest = self._largest.tolist()
        self._bad = {number for number, largest in enumerate(all_largest) if math.isinf(largest)}
        if self._bad:
            return False  # the step is bad, and has no sums
        needed = [_needed_exponent(largest) for largest in all_largest]
        is_too_small = [need > exponent for need, exponent in zip(needed, self._exponents, strict=True)]
        for number, need in enumerate(needed):
            if is_too_small[number]:
                self._exponents[number] = need + _HEADROOM
        return any(is_too_small)

    def gradient(self, number: int, sums: torch.Tensor, out: torch.Tensor) -> None:
        """Set a flat gradient to what integer sums mean; to NaN if no number does."""
        if number in self._bad:
            out.fill_(math.nan)
            return
        scratch = _scratch(out, len(out))
        size = _chunk_size(out)
        for part, total in zip(out.split(size), sums.split(size), strict=True):
            part.copy_(scratch[: len(part)].copy_(total).mul_(self.of(number)))

    def begin_next(self) -> None:
        """Choose the units of the next step by the largest gradients of this one."""
        for number, largest in enumerate(self._largest.tolist()):
            if largest and math.isfinite(largest):
                self._exponents[number] = _needed_exponent(largest) + _HEADROOM
        self.forget()

    def forget(self) -> None:
        """Forget the gradients of this step."""
        self._largest.zero_()


def _bits_of(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude; infinity, which a maximum does not lose, where there is a NaN."""
    if not len(values):
        return torch.zeros((), dtype=torch.float64, device=values.device)
    least, most = torch.aminmax(values)  # many times as fast as the norm
    return torch.maximum(-least, most).double().nan_to_num_(nan=math.inf, posinf=math.inf)


def _chunk_size(values: torch.Tensor) -> int:
    return _CHUNK if values.device.type == "cpu" else _GPU_CHUNK


def _scratch(values: torch.Tensor, length: int) -> torch.Tensor:
    """Return memory for numbers between the operations on a chunk of `length` values."""
    return torch.empty(min(length, _chunk_size(values)), dtype=torch.float64, device=values.device)


def sums_of_squares(
    gradients: Sequence[torch.Tensor], world: World | None = None, *, num_replicas: int = 1
) -> list[float]:
    """Return the sum of the squares of each flat gradient; with a `world`, of the shards of its ranks. All ranks.

    Each shard is on `num_replicas` of them, and counts once.

    A sum differs from the real one by at most the number of elements times 2^-44 of the largest square.
    """
    if not gradients:
        return []
    largest = torch.stack([_largest(gradient) for gradient in gradients])
    if world is not None and world.size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    all_largest = largest.tolist()
    exponents = [math.frexp(each)[1] if math.isfinite(each) else 0 for each in all_largest]
    scratch = _scratch(gradients[0], max(map(len, gradients)))
    of_chunks = [
        _sums_of_squares_in_chunks(gradient, math.ldexp(1.0, -exponent), scratch)
        for gradient, exponent in zip(gradients, exponents, strict=True)
    ]
    counts = [len(each) for each in of_chunks]
    numbers = iter(torch.cat(of_chunks).tolist())
    sums = [sum(islice(numbers, count)) for count in counts]
    if world is not None and world.size > 1:
        halves = torch.tensor([(each >> _LOW_BITS, each & (1 << _LOW_BITS) - 1) for each in sums]).to(largest.device)
        dist.all_reduce(halves)
        sums = [((high << _LOW_BITS) + low) // num_replicas for high, low in halves.tolist()]
    return [
        math.ldexp(total, 2 * exponent - _SQUARE_BITS) if math.isfinite(most) else math.nan
        for total, exponent, most in zip(sums, exponents, all_largest, strict=True)
    ]


def _sums_of_squares_in_chunks(values: torch.Tensor, scale: float, scratch: torch.Tensor) -> torch.Tensor:
    """Return sums of the squares of flat values that `scale` makes at most 1, in multiples of 2^-45, as int64."""
    offset = math.ldexp(_SIGNIFICANT, -_SQUARE_BITS)
    bits = _bits_of(offset)
    sums = []
    for part in values.split(_chunk_size(values)):
        near = scratch[: len(part)].copy_(part).mul_(scale)
        multiples = near.mul_(near).add_(offset).view(torch.int64).sub_(bits)
        full = len(part) - len(part) % _CHUNK
        sums += [multiples[:full].view(-1, _CHUNK).sum(1), multiples[full:].sum().view(1)]
    return torch.cat(sums)


def norm_of(squares: Sequence[float]) -> float:
    """Return the 2-norm, of sums of squares in any order."""
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan


def _needed_exponent(largest: float) -> int:
    """Return the exponent of the least unit of which a number is few enough multiples."""
    return math.frexp(largest)[1] - _BITS + 1 if largest else _UNKNOWN


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
        self._parameters = list(reversed(trained.values()))
        self.units = Units(list(reversed(trained)), world.device)
        self._sums: list[torch.Tensor] = []  # bucket by bucket
        self._gradients: list[torch.Tensor] = []
        self._sizes: list[int] = []
        self._missing: list[int] = []
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each parameter: its sums, its gradient
        self._unset: set[int] = set()  # parameters without a gradient in this step yet, whose sums have no values
        for group in grouped(self._parameters, BUCKET_BYTES):
            sums = torch.empty(sum(p.numel() for p in group), dtype=torch.int64, device=world.device)
            gradients = torch.zeros(len(sums), dtype=group[0].dtype, device=world.device)
            offset = 0
            for parameter in group:
                place = slice(offset, offset := offset + parameter.numel())
                reached = partial(self._reached, len(self._views), len(self._sums))
                parameter.register_post_accumulate_grad_hook(reached)
                self._views.append((sums[place], gradients[place]))
            self._sums.append(sums)
            self._gradients.append(gradients)
            self._sizes.append(len(group))
        self.zero()

    def zero(self) -> None:
        """Drop all gradients and sums."""
        self.units.forget()
        self._unset = set(range(len(self._parameters)))
        for parameter in self._parameters:
            parameter.grad = None

    def arm(self) -> None:
        """Sum the buckets over the ranks as they fill during the next backward pass. All ranks."""
        self._armed, self._missing = True, list(self._sizes)

    def must_repeat(self) -> bool:
        """Wait for the sums; return whether the step must be run again, with other units. All ranks."""
        for number in self._unset:
            self._views[number][0].zero_()
        while len(self._works) < len(self._sums) and self._world.size > 1:
            self._sum_next()
        for work in self._works:
            work.wait()
        self._works.clear()
        self._armed = False
        must_change = self.units.must_change(self._world)
        if must_change:
            self.zero()
        return must_change

    def finish(self) -> None:
        """Turn the sums into gradients."""
        for number, parameter in enumerate(self._parameters):
            sums, gradient = self._views[number]
            self.units.gradient(number, sums, gradient)
            parameter.grad = gradient.view_as(parameter)

    def squares(self) -> list[float]:
        """Return the sum of the squares of each parameter's gradient."""
        return sums_of_squares([gradient for _, gradient in self._views])

    def norm(self) -> float:
        """Return the 2-norm of all gradients."""
        return norm_of(self.squares())

    def scale(self, factor: float) -> None:
        """Multiply all gradients by `factor`, and choose the units of the next step."""
        if factor != 1.0:
            for bucket in self._gradients:
                bucket.mul_(factor)
        self.units.begin_next()

    def _reached(self, number: int, bucket: int, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        is_first = number in self._unset
        self._unset.discard(number)
        self.units.add_multiples(number, gradient.reshape(-1), self._views[number][0], is_first=is_first)
        if self._armed and self._world.size > 1:
            if bucket < len(self._works):
                raise reached_again()
            self._missing[bucket] -= 1
            while len(self._works) < len(self._sums) and self._missing[len(self._works)] == 0:
                self._sum_next()

    def _sum_next(self) -> None:
        work = dist.all_reduce(self._sums[len(self._works)], async_op=True)
        assert work is not None
        self._works.append(work)

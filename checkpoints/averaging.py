"""The mean of the weights of several checkpoints of one model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shardlaunch.checkpoints.exporting import Weight, all_finite, weights_of
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.errors import UserError, some


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Weights that are read as means, and the tensors whose values of the last checkpoint are taken."""

    weights: list[Weight]
    of_last: list[str]


def mean_of(checkpoints: Sequence[Checkpoint], shares: Sequence[float] = ()) -> Mean:
    """Return the mean of checkpoints, each times its share (default: all alike). Sums are in float64.

    Tensors that are not floating-point, such as counts, are those of the last one; those that are not equal
    everywhere are named. Raises UserError for checkpoints of different models, and for values that are not finite.
    """
    shares = list(shares) or [1.0] * len(checkpoints)
    if len(shares) != len(checkpoints):
        raise UserError(f"--weights: {len(shares)} numbers for {len(checkpoints)} checkpoints")
    total = math.fsum(shares)
    if not all(math.isfinite(share) and share >= 0 for share in shares) or total <= 0:
        raise UserError(f"--weights {' '.join(map(str, shares))}: must be finite, at least 0, and not all 0")
    if len(checkpoints) < 2:
        raise UserError("at least two checkpoints are required, such as RUN/checkpoints/step-*, and then OUT")
    step_dirs = [checkpoint.step_dir.resolve() for checkpoint in checkpoints]
    twice = [str(path) for path in step_dirs if step_dirs.count(path) > 1]
    if twice:
        raise UserError(f"{twice[0]}: is given twice; --weights lets a checkpoint count more")
    tensors = [{weight.name: weight for weight in weights_of(checkpoint)} for checkpoint in checkpoints]
    for checkpoint, other in zip(checkpoints[:-1], tensors[:-1], strict=True):
        _check_same_model(checkpoint.step_dir, other, checkpoints[-1].step_dir, tensors[-1])
    normalized = [share / total for share in shares]
    weights, of_last = [], []
    for name, last in tensors[-1].items():
        parts = [other[name] for other in tensors]
        if last.dtype.is_floating_point:
            weights.append(Weight(name=name, shape=last.shape, dtype=last.dtype, read=_reader(name, parts, normalized)))
        else:
            weights.append(last)
            if not _all_equal(parts):
                of_last.append(name)
    return Mean(weights=weights, of_last=of_last)


def _check_same_model(step_dir: Path, one: dict[str, Weight], last_dir: Path, last: dict[str, Weight]) -> None:
    missing = sorted(one.keys() ^ last.keys())
    if missing:
        raise UserError(f"{step_dir} and {last_dir}: are of different models: only one of them has {some(missing, 3)}")
    for name, weight in one.items():
        if (weight.shape, weight.dtype) != (last[name].shape, last[name].dtype):
            forms = " and ".join(f"{list(it.shape)} {it.dtype}" for it in (weight, last[name]))
            raise UserError(f"{step_dir} and {last_dir}: are of different models: {name} is {forms}")


def _reader(name: str, parts: Sequence[Weight], shares: Sequence[float]) -> Callable[[int, int], torch.Tensor]:
    def read(start: int, end: int) -> torch.Tensor:
        total = torch.zeros(end - start, dtype=torch.float64)
        for part, share in zip(parts, shares, strict=True):
            piece = part.read(start, end)
            if not all_finite(piece):
                raise UserError(f"{name}: holds values that are not finite in one of the checkpoints; leave it out")
            total.add_(piece, alpha=share)  # in float64, as the sum is
        return total.to(parts[-1].dtype)

    return read


def _all_equal(parts: Sequence[Weight]) -> bool:
    last = parts[-1].read(0, parts[-1].num_elements)
    return all(torch.equal(part.read(0, part.num_elements), last) for part in parts[:-1])

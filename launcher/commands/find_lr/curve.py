"""Losses over a rising learning rate: where they diverge, and which rate they suggest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardlaunch.checkpoints.records import Record

DIVERGED = 4.0
"""A smoothed loss of so many times the lowest one has diverged."""
MARGIN = 10.0
"""Of the suggested rate to the one with the lowest loss."""
_MEMORY = 0.9  # of the smoothed loss that is watched
_LEAST_STEPS = 5  # before that
_LEAST_FALL = 0.02  # of the first loss, for a suggestion
_WINDOW = 12  # a running mean is over this part of the steps


@dataclass(frozen=True, kw_only=True)
class Request:
    """A range of learning rates, which rises by the same factor in each step."""

    low: float
    high: float
    steps: int

    def rate(self, step: int) -> float:
        """Return the rate of a step, from 0."""
        done = min(1.0, step / max(1, self.steps - 1))
        return float(self.high * (self.low / self.high) ** (1 - done))


class CurveRecord(Record):
    """The file that the ranks of a search write."""

    lrs: list[float]
    losses: list[float]
    skipped: list[int]
    """Steps, from 0, whose update a loss scale has skipped."""
    has_diverged: bool


@dataclass(kw_only=True)
class Curve:
    """Rates and losses of the steps so far."""

    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    has_diverged: bool = False
    _average: float = 0.0
    _lowest: float = math.inf

    def add(self, lr: float, loss: float, *, is_skipped: bool) -> None:
        """Add a step, and note whether the loss has diverged: decided from numbers that are equal on all ranks."""
        if is_skipped:
            self.skipped.append(len(self.losses))
        self.lrs.append(lr)
        self.losses.append(loss)
        if not math.isfinite(loss):
            self.has_diverged = True
            return
        self._average = _MEMORY * self._average + (1 - _MEMORY) * loss
        smooth = self._average / (1 - _MEMORY ** len(self.losses))
        self._lowest = min(self._lowest, smooth)
        bound = self._lowest + (DIVERGED - 1) * abs(self._lowest)
        self.has_diverged = len(self.losses) > _LEAST_STEPS and smooth > bound

    def record(self) -> dict[str, Any]:
        """Return what is written."""
        return {
            "lrs": self.lrs,
            "losses": self.losses,
            "skipped": self.skipped,
            "has_diverged": self.has_diverged,
        }


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What a curve says about learning rates."""

    lr: float | None
    """The rate to try: `steepest_lr`, at most a tenth of `lowest_lr`; None where the loss does not fall."""
    steepest_lr: float | None
    """Where the loss falls fastest."""
    lowest_lr: float | None
    """Where the loss is lowest: above it, it rises again."""
    smooth: Sequence[float]
    """Running mean of the losses, as many as there are finite ones."""


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Return the rate at which the running mean of the losses falls fastest, per factor of the rate.

    The mean is over steps on both sides, so that it does not lag behind the rate. Just before it diverges, the loss
    often falls fastest: the suggestion keeps a factor of 10 from the rate with the lowest loss.
    """
    count = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    smooth = _running_mean(np.array(losses[:count]))
    lowest = int(smooth.argmin()) if count else 0
    if lowest < 2 or smooth[0] - smooth[lowest] < _LEAST_FALL * abs(smooth[0]):
        return Suggestion(lr=None, steepest_lr=None, lowest_lr=None, smooth=smooth.tolist())
    slopes = np.gradient(smooth[: lowest + 1], np.log(np.array(lrs[: lowest + 1])))
    steepest = lrs[int(slopes.argmin())]
    return Suggestion(
        lr=min(steepest, lrs[lowest] / MARGIN), steepest_lr=steepest, lowest_lr=lrs[lowest], smooth=smooth.tolist()
    )


def _running_mean(values: np.ndarray) -> np.ndarray:
    reach = max(1, len(values) // _WINDOW // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    numbers = np.arange(len(values))
    # The same reach on both sides, so that the mean stays where the rate is.
    reaches = np.minimum(reach, np.minimum(numbers, len(values) - 1 - numbers))
    first, last = numbers - reaches, numbers + reaches + 1
    result: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return result

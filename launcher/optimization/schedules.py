"""Learning-rate schedules: factors on the peak learning rate, as functions of the step only."""

import math
from dataclasses import dataclass
from typing import Literal

from shardlaunch.errors import UserError
from shardlaunch.launcher.option_fields import option

# One cycle: fraction of the steps for the rise, and first and last learning rate as fractions of the peak.
ONE_CYCLE_RISE, ONE_CYCLE_FIRST, ONE_CYCLE_LAST = 0.3, 1 / 25, 1 / 250_000


@dataclass(kw_only=True)
class ScheduleOptions:
    """Options of the learning-rate schedule."""

    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "constant"
    """Learning-rate schedule after warm-up."""
    warmup_steps: int = option(0, minimum=0)
    """Warm-up steps, instead of --warmup-ratio (0: use the ratio)."""
    warmup_ratio: float = option(0.0, minimum=0, below=1)
    """Warm-up as a fraction of all steps (one-cycle: 0.3 if 0)."""
    final_lr_ratio: float = option(0.0, minimum=0, maximum=1)
    """Final learning rate of linear and cosine, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if self.final_lr_ratio and self.schedule not in ("linear", "cosine"):
            raise UserError(
                f"--final-lr-ratio: has no effect with --schedule {self.schedule}; remove it, or use linear or cosine"
            )


def scheduled(step: int, num_steps: int, options: ScheduleOptions) -> float:
    """Return the options' learning-rate factor for step `step` (from 0) of `num_steps`."""
    warmup_steps = options.warmup_steps or int(options.warmup_ratio * num_steps)
    if options.schedule == "one-cycle":
        return one_cycle(step, num_steps, rise_steps=warmup_steps or int(ONE_CYCLE_RISE * num_steps))
    if options.schedule == "constant":
        return constant(step, num_steps, warmup_steps=warmup_steps)
    shape = linear if options.schedule == "linear" else cosine
    return shape(step, num_steps, warmup_steps=warmup_steps, final=options.final_lr_ratio)


def require_extendable(
    options: ScheduleOptions, num_steps: int, extended_steps: int, *, has_own_schedule: bool
) -> None:
    """Raise UserError unless the schedule defines a learning rate above 0 for the steps past `num_steps`.

    A constant schedule continues; linear and cosine schedules keep their final learning rate.
    """
    where = f"--extend-to-steps {extended_steps}"
    if extended_steps <= num_steps:
        raise UserError(f"{where}: must be more than the run's {num_steps} steps")
    if has_own_schedule:
        raise UserError(f"{where}: the recipe has its own schedule() over {num_steps} steps; start a new run instead")
    if options.schedule == "one-cycle" or (options.schedule != "constant" and not options.final_lr_ratio):
        raise UserError(
            f"{where}: --schedule {options.schedule} ends at a learning rate of 0 after {num_steps} steps. "
            f"Only constant, and linear or cosine with --final-lr-ratio above 0, can be extended; start a new run"
        )


def constant(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Rise from 0 to 1 over the warm-up, then stay there."""
    return (step + 1) / (warmup_steps + 1) if step < warmup_steps else 1.0


def linear(step: int, num_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Rise from 0 to 1 over the warm-up, then fall to `final` at the end of the run."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return final + (1 - final) * max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))


def cosine(step: int, num_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Rise from 0 to 1 over the warm-up, then fall to `final` along half a cosine."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def one_cycle(step: int, num_steps: int, *, rise_steps: int) -> float:
    """Rise from 1/25 to 1 and fall to 1/250,000, each along half a cosine (Smith 2018). Momentum is constant."""
    if step < rise_steps:
        first, last, done = ONE_CYCLE_FIRST, 1.0, step / rise_steps
    else:
        first, last, done = 1.0, ONE_CYCLE_LAST, min(1.0, (step - rise_steps) / max(1, num_steps - 1 - rise_steps))
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * done))

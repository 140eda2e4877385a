"""Averages of the weights over the updates of a run: exponential (EMA) or equal (SWA)."""

import math
from dataclasses import dataclass
from typing import Literal

from shardlaunch.errors import UserError
from shardlaunch.launcher.option_fields import option


@dataclass(kw_only=True)
class AveragingOptions:
    """Options of the average of the weights."""

    ema: float = option(0.0, minimum=0, below=1)
    """Keep an exponential moving average of the weights, with this decay per update, such as 0.999 (0: off)."""
    ema_half_life: float = option(0.0, minimum=0)
    """The same, by samples: after N of them an update counts half as much, at any batch size (0: off)."""
    swa_from: float = option(0.0, minimum=0)
    """Keep the equal average of the weights (SWA) from this step on; below 1: from this part of the run, such as 0.75
    (0: off)."""
    eval_ema: Literal["both", "only"] = option("both", mark="free")
    """With an average, evaluate both the weights and the average, or the average only."""

    def __post_init__(self) -> None:
        given = [name for name, value in self._kinds().items() if value]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: a run keeps one average of its weights; remove one of them")
        if self.swa_from >= 1 and self.swa_from != int(self.swa_from):
            raise UserError(f"--swa-from {self.swa_from:g}: must be a whole number, or below 1 for a part of the run")
        if self.eval_ema != "both" and not given:
            raise UserError(
                f"--eval-ema {self.eval_ema}: has no effect without an average; set --ema, --ema-half-life or "
                f"--swa-from, or remove it"
            )

    def _kinds(self) -> dict[str, float]:
        return {"--ema": self.ema, "--ema-half-life": self.ema_half_life, "--swa-from": self.swa_from}

    @property
    def keeps_average(self) -> bool:
        """Return whether the run keeps an average."""
        return any(self._kinds().values())

    def first_averaged(self, num_steps: int) -> int:
        """Return the first step whose weights the average takes in. Raises UserError if it is after the last."""
        first = math.floor(self.swa_from * num_steps) + 1 if self.swa_from < 1 else int(self.swa_from)
        if first > num_steps:
            raise UserError(f"--swa-from {self.swa_from:g}: the run has {num_steps} steps; give an earlier one")
        return first

    def weight_of_update(self, num_averaged: int, num_samples: int) -> float:
        """Return how far an update on so many samples moves an average of so many updates towards the weights."""
        if self.swa_from:
            return 1 / (num_averaged + 1)
        return -math.expm1(-math.log(2) * num_samples / self.ema_half_life) if self.ema_half_life else 1 - self.ema

    def part_of_first(self, num_steps: int, num_samples: int) -> float:
        """Return how much of the average, after so many steps on so many samples each, is still the first weights."""
        if self.ema_half_life:
            return math.exp2(-(num_steps - 1) * num_samples / self.ema_half_life)
        return self.ema ** (num_steps - 1) if self.ema else 0.0

    def describe_average(self, num_steps: int) -> str:
        """Return a few words on the average."""
        if self.swa_from:
            return f"equal, of the weights from step {self.first_averaged(num_steps):,} on"
        if self.ema_half_life:
            return f"exponential, half-life {self.ema_half_life:,.10g} samples"
        return f"exponential, decay {self.ema:g} per update"

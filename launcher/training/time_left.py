"""The time that a run has left: until the end of --max-time, and after a signal until the end of --grace-s."""

import math
import time
from collections.abc import Callable
from typing import Self

import psutil

from shardlaunch.launcher.durations import duration_text, seconds_of
from shardlaunch.launcher.options import Options
from shardlaunch.sharding.environment import JOB_END_VARIABLE, end_of_job, has_agent

MARGIN = 1.5  # steps and saves may take longer than those before
MARGIN_S = 2.0  # from the last save to the end of the process
ASSUMED_BYTES_PER_S = 100e6  # of a save, before the first is measured


class TimeLeft:
    """Tells from the measured time of steps and saves whether there is time for more."""

    def __init__(
        self,
        *,
        max_time_s: float = 0,
        grace_s: float = 0,
        mtbf_s: float = 0,
        job_ends_at: float | None = None,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`max_time_s` counts from the start of the launcher, or of this process if it has none (0: no limit).

        Without it, the limit is `job_ends_at`, in seconds as of time.time() (None: no limit).
        `mtbf_s` is the mean time between failures that saves are to be made for (0: at steps of the user's choice).
        `say` and `warn` get a message, once, when a save has been measured.
        """
        self.grace_s = grace_s
        self.save_s = self._longest_s = self._stood_s = 0.0
        self.is_saving = False
        self._step_s = 0.0
        self._mtbf_s = mtbf_s
        self._say = say
        self._warn = warn
        self._saved_at = time.monotonic()
        self._step_began = time.monotonic()
        self._end = time.monotonic() - _age_s() + max_time_s - MARGIN_S if max_time_s else 0.0
        self.end_source = "--max-time"
        if not max_time_s and job_ends_at is not None:
            self.end_source = JOB_END_VARIABLE
            self._end = time.monotonic() + job_ends_at - time.time() - MARGIN_S

    @classmethod
    def of(cls, options: Options, *, say: Callable[[str], None], warn: Callable[[str], None]) -> Self:
        """Return that of a run with these options."""
        return cls(
            max_time_s=seconds_of(options.max_time, "--max-time") if options.max_time else 0,
            grace_s=options.grace_s,
            job_ends_at=end_of_job()[0],
            mtbf_s=seconds_of(options.mtbf, "--mtbf") if options.save_every == "auto" else 0,
            say=say,
            warn=warn,
        )

    def assume_save_of(self, num_bytes: int) -> None:
        """Assume how long a save of this rank's `num_bytes` takes, until one is measured."""
        self.save_s = self.save_s or num_bytes / ASSUMED_BYTES_PER_S

    def save_begins(self) -> None:
        self._saved_at = time.monotonic()
        self.is_saving = True

    def save_took(self, seconds: float, stood_s: float) -> None:
        """Remember the slowest save, and for how long the training has stood still at most."""
        self.is_saving = False
        is_first = not self._longest_s
        if seconds > self.grace_s >= self._longest_s and self.grace_s:
            self._warn(
                f"saving takes {duration_text(seconds)}, longer than --grace-s {self.grace_s:g}: a run that is asked "
                f"to stop may be killed before it has saved. Have the cluster wait longer, and say so with --grace-s"
            )
        self._longest_s = self.save_s = max(seconds, self._longest_s)
        self._stood_s = max(stood_s, self._stood_s)
        if is_first and self._mtbf_s:
            self._say(
                f"saving about every {duration_text(self.save_interval_s)}: the training stands still for "
                f"{duration_text(stood_s)} in a save, and one failure is expected per {duration_text(self._mtbf_s)} "
                f"(--mtbf)"
            )

    def step_begins(self) -> None:
        self._step_began = time.monotonic()

    def step_took(self, seconds: float) -> None:
        """Remember the slowest step, which is forgotten by and by: the first one often takes long."""
        self._step_s = max(seconds, 0.9 * self._step_s)

    @property
    def save_interval_s(self) -> float:
        """Return the best time between saves: what they cost, and what failures do, is least (J. T. Daly, 2006).

        One save ends before the next.
        """
        cost_s = self._stood_s or self.save_s
        if cost_s >= 2 * self._mtbf_s:
            return self._mtbf_s
        part = cost_s / (2 * self._mtbf_s)
        best_s = math.sqrt(2 * cost_s * self._mtbf_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s
        return max(best_s, self.save_s)

    @property
    def _saves_s(self) -> float:
        """Return how long a save takes at most, after the one that is under way."""
        return (1 + self.is_saving) * self.save_s

    def is_save_due(self) -> bool:
        """Return whether the best time since the last save has passed."""
        return bool(self._mtbf_s) and time.monotonic() - self._saved_at > self.save_interval_s

    def is_over(self) -> bool:
        """Return whether --max-time, or the job, has no room for one more step and a save."""
        return bool(self._end) and time.monotonic() + MARGIN * (self._step_s + self._saves_s) > self._end

    def is_short(self, asked_at: float | None) -> bool:
        """Return whether the rest of the current step and a save take longer than what is left.

        `asked_at` is when a signal asked to stop, of time.monotonic(); None: none has. True in a first step.
        """
        now = time.monotonic()
        ends = [end for end in (self._end, asked_at + self.grace_s if asked_at is not None else 0.0) if end]
        rest = max(0.0, MARGIN * self._step_s - (now - self._step_began)) if self._step_s else self.grace_s
        return bool(ends) and now + rest + MARGIN * self._saves_s > min(ends)


def _age_s() -> float:
    process = psutil.Process()
    began: float = ((process.parent() or process) if has_agent() else process).create_time()
    return time.time() - began

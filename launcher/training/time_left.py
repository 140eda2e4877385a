"""The time that a run has left: until the end of --max-time, and after a signal until the end of --grace-s."""

import time

import psutil

from shardlaunch.sharding.environment import JOB_END_VARIABLE, has_agent

MARGIN = 1.5  # steps and saves may take longer than those before
MARGIN_S = 2.0  # from the last save to the end of the process
ASSUMED_BYTES_PER_S = 100e6  # of a save, before the first is measured


class TimeLeft:
    """Tells from the measured time of steps and saves whether there is time for more."""

    def __init__(self, *, max_time_s: float = 0, grace_s: float = 0, job_ends_at: float | None = None) -> None:
        """`max_time_s` counts from the start of the launcher, or of this process if it has none (0: no limit).

        Without it, the limit is `job_ends_at`, in seconds as of time.time() (None: no limit).
        """
        self.grace_s = grace_s
        self.save_s = self._longest_s = 0.0
        self._step_s = 0.0
        self._step_began = time.monotonic()
        self._end = time.monotonic() - _age_s() + max_time_s - MARGIN_S if max_time_s else 0.0
        self.end_source = "--max-time"
        if not max_time_s and job_ends_at is not None:
            self.end_source = JOB_END_VARIABLE
            self._end = time.monotonic() + job_ends_at - time.time() - MARGIN_S

    def assume_save_of(self, num_bytes: int) -> None:
        """Assume how long a save of this rank's `num_bytes` takes, until one is measured."""
        self.save_s = self.save_s or num_bytes / ASSUMED_BYTES_PER_S

    def save_took(self, seconds: float) -> bool:
        """Remember the slowest save; return whether it is the first that takes longer than the time of grace."""
        is_first = seconds > self.grace_s >= self._longest_s
        self._longest_s = self.save_s = max(seconds, self._longest_s)
        return is_first

    def step_begins(self) -> None:
        self._step_began = time.monotonic()

    def step_took(self, seconds: float) -> None:
        """Remember the slowest step, which is forgotten by and by: the first one often takes long."""
        self._step_s = max(seconds, 0.9 * self._step_s)

    def is_over(self) -> bool:
        """Return whether --max-time, or the job, has no room for one more step and a save."""
        return bool(self._end) and time.monotonic() + MARGIN * (self._step_s + self.save_s) > self._end

    def is_short(self, asked_at: float | None) -> bool:
        """Return whether the rest of the current step and a save take longer than what is left.

        `asked_at` is when a signal asked to stop, of time.monotonic(); None: none has. True in a first step.
        """
        now = time.monotonic()
        ends = [end for end in (self._end, asked_at + self.grace_s if asked_at is not None else 0.0) if end]
        rest = max(0.0, MARGIN * self._step_s - (now - self._step_began)) if self._step_s else self.grace_s
        return bool(ends) and now + rest + MARGIN * self.save_s > min(ends)


def _age_s() -> float:
    process = psutil.Process()
    began: float = ((process.parent() or process) if has_agent() else process).create_time()
    return time.time() - began

"""What a run does about a loss or gradient that is not finite, and about a loss far above those before it."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options

WINDOW = 64  # losses that a spike is judged by
LEAST = 16  # of them; before, nothing is a spike
LEAST_SPREAD = 0.01  # of the median loss: on a plateau, noise alone is no spike
MOST_IN_A_ROW = 20
_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation


class RollBack(Exception):
    """The run goes back to a checkpoint, and leaves out global batches up to that of `step`. On all ranks."""

    def __init__(self, step: int, cause: str) -> None:
        super().__init__(f"step {step}: {cause}")
        self.step = step
        self.cause = cause


class Judge:
    """Judges each step by its loss and gradient norm, which are the same on all ranks."""

    def __init__(self, options: Options, *, has_loss_scale: bool) -> None:
        self._on_nonfinite = options.on_nonfinite
        self._on_spike = options.on_spike
        self._threshold = options.spike_threshold
        self._has_loss_scale = has_loss_scale
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._num_in_a_row = 0

    @property
    def recent(self) -> list[float]:
        """Return the losses that the next one is judged by, for a checkpoint."""
        return list(self._recent)

    def restore(self, recent: Sequence[float]) -> None:
        self._recent = deque(recent, maxlen=WINDOW)

    def skips(self, step: int, loss: float, norm: float) -> bool:
        """Return whether to skip the update of a step. Raises UserError to stop the run, RollBack to go back.

        With a loss scale, a norm that is not finite is one that is scaled too high, which is not judged here.
        """
        is_finite = math.isfinite(loss) and (self._has_loss_scale or math.isfinite(norm))
        bound = self._bound()
        if is_finite and loss <= bound:
            if self._on_spike != "off":
                self._recent.append(loss)
            self._num_in_a_row = 0
            return False
        self._num_in_a_row += 1
        cause = f"loss {loss:.6g}, gradient norm {norm:.6g}" if not is_finite else f"loss {loss:.6g} above {bound:.6g}"
        action = self._on_spike if is_finite else self._on_nonfinite
        if self._num_in_a_row > MOST_IN_A_ROW:
            raise UserError(
                f"step {step}: {cause}; {MOST_IN_A_ROW} steps before it were skipped already, so that this is no "
                f"exception. Try a smaller --lr, or --max-grad-norm; the last checkpoint is still valid."
            )
        if action == "rollback":
            raise RollBack(step, cause)
        if action == "stop":
            raise UserError(
                f"step {step}: {cause}; stopped before the update. Try a smaller --lr, --max-grad-norm or another "
                f"--precision, or go on without such batches: {'--on-spike' if is_finite else '--on-nonfinite'} skip. "
                f"The last checkpoint is still valid."
            )
        return True

    def _bound(self) -> float:
        """Return the largest loss that is no spike: the median of recent ones and some of their robust deviations."""
        if self._on_spike == "off" or len(self._recent) < LEAST:
            return math.inf
        median = statistics.median(self._recent)
        deviation = statistics.median(abs(loss - median) for loss in self._recent)
        return median + self._threshold * max(_TO_SIGMA * deviation, LEAST_SPREAD * abs(median))

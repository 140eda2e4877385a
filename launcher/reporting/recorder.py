"""The record of a run as it goes: metrics.jsonl, trackers, and the progress that a person sees."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardlaunch.launcher.reporting.display import Display, ProgressView
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX, MetricsLog, Trackers, numbers


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Metrics of one training step: loss per target, gradient norm before clipping, counts over all ranks, seconds."""

    loss: float
    lr: float
    grad_norm: float
    samples: int
    tokens: int
    step_s: float
    is_skipped: bool


class Recorder:
    """Metrics of a run, on their way to disk, trackers and a person; idle until `open` is called, on rank 0 alone."""

    def __init__(
        self, display: Display, *, log_every: int, track_every: int, steps_per_epoch: int, num_steps: int
    ) -> None:
        self._display = display
        self._log_every = log_every
        self._track_every = track_every
        self._steps_per_epoch = steps_per_epoch
        self._num_steps = num_steps
        self._log: MetricsLog | None = None
        self._trackers: Trackers | None = None
        self._progress: ProgressView | None = None

    def open(
        self,
        stack: ExitStack,
        output_dir: Path,
        *,
        trackers: list[str],
        step: int,
        end: int,
        options: Mapping[str, Any],
    ) -> None:
        """Open metrics.jsonl, cut back to `step`, the trackers, and the progress up to step `end`. Rank 0.

        `stack` closes them. Raises OSError when a file cannot be written.
        """
        self._log = MetricsLog(output_dir, resumed_step=step)
        stack.callback(self._log.close)
        self._trackers = Trackers(trackers, output_dir, resumed_step=step, options=options, warn=self._display.warn)
        stack.callback(self._trackers.close)
        self._progress = stack.enter_context(self._display.progress(done=step, total=end))

    def on_step(self, step: int, report: StepReport) -> None:
        """Record a training step."""
        if self._log is None or self._trackers is None or self._progress is None:
            return
        self._progress.step(
            step,
            loss=report.loss,
            lr=report.lr,
            tokens=report.tokens,
            samples=report.samples,
            step_s=report.step_s,
        )
        values = {"loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm}
        if step % self._log_every == 0 or step == self._num_steps:
            counts = {"samples": report.samples, "tokens": report.tokens, "step_s": report.step_s}
            skipped = {"skipped": True} if report.is_skipped else {}
            self._log.write({**self._where(step), **values, **counts, **skipped})
        if step % self._track_every == 0 or step == self._num_steps:
            self._trackers.log(values, step)

    def on_evaluating(self, num_done: int, num_samples: int) -> None:
        """Show how far an evaluation is."""
        if self._progress is not None:
            self._progress.evaluating(num_done, num_samples)

    def on_evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        """Record the results of an evaluation: numbers, and lists of them."""
        if self._log is not None and self._trackers is not None:
            values = {f"{EVAL_PREFIX}{name}": value for name, value in results.items()}
            self._log.write({**self._where(step), **values})
            self._trackers.log(numbers(values), step)
        shown = (f"{name} {value:.4f}" for name, value in numbers(results).items())
        self._display.say(f"step {step}: " + "  ".join(shown))

    def sync(self) -> None:
        """Make what was written durable. Raises OSError."""
        if self._log is not None:
            self._log.sync()

    def _where(self, step: int) -> dict[str, float]:
        return {"step": step, "epoch": step / self._steps_per_epoch}

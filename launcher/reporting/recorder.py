"""The record of a run as it goes: metrics.jsonl, trackers, and the progress that a person sees."""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from shardlaunch.checkpoints.files import error_text, make_folder, replace_file
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.display import Display, ProgressView
from shardlaunch.launcher.reporting.media import MEDIA, Medium, file_name
from shardlaunch.launcher.reporting.trackers import TrackedRun, Trackers
from shardlaunch.launcher.reporting.tracking import EMA_PREFIX, EVAL_PREFIX, TRAIN_PREFIX, MetricsLog, numbers


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
    ranks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Minimum, median and maximum over the ranks of the seconds per part of a step, where a report is due."""
    slowest: str = ""
    """Which rank is clearly slower than the others."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of the state after the step, by their names in metrics.jsonl, where they are due."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """What the recipe has logged, by its names."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return the numbers of the step by their names in metrics.jsonl."""
        own = {f"{TRAIN_PREFIX}{name}": value for name, value in self.logged.items()}
        return {"loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm, **own}


class Recorder:
    """Metrics of a run, on their way to disk, trackers and a person; idle until `open` is called, on rank 0 alone."""

    def __init__(
        self, display: Display, *, log_every: int, track_every: int, steps_per_epoch: int, last_step: int
    ) -> None:
        self._display = display
        self._log_every = log_every
        self._track_every = track_every
        self._steps_per_epoch = steps_per_epoch
        self._last_step = last_step
        self._log: MetricsLog | None = None
        self._trackers: Trackers | None = None
        self._progress: ProgressView | None = None
        self._since_tracked: list[StepReport] = []
        self._ranks: Mapping[str, Sequence[float]] = {}  # for the next line
        self._slowest = ""
        self._bad: set[str] = set()  # that have been said
        self.last_evaluation: Mapping[str, Any] = {}
        """Line of the newest evaluation in metrics.jsonl, empty before the first."""

    def open(
        self,
        stack: ExitStack,
        run: TrackedRun,
        *,
        trackers: Sequence[str],
        step: int,
        end: int,
        options: Mapping[str, Any],
        is_evaluation_due: bool = False,
    ) -> None:
        """Open metrics.jsonl, cut back to `step`, the trackers, and the progress up to step `end`. Rank 0.

        `stack` closes them. Raises UserError when metrics.jsonl is no file, or a tracker cannot be started.
        """
        self._log = MetricsLog(
            run.output_dir, resumed_step=step, is_evaluation_due=is_evaluation_due, warn=self._display.warn
        )
        stack.callback(self._log.close)
        self.last_evaluation = self._log.last_evaluation
        self._trackers = Trackers(
            trackers,
            run,
            resumed_step=step,
            options=options,
            warn=self._display.warn,
            silent=self._display.console.quiet,
        )
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
        values = report.metrics
        self._say_bad(step, report.logged)
        self._ranks = report.ranks or self._ranks
        if report.ranks and report.slowest.partition(":")[0] != self._slowest:  # said once, and again if it is another
            self._slowest = report.slowest.partition(":")[0]
            self._display.say(report.slowest or "no rank is slower than the others any more")
        if step % self._log_every == 0 or step == self._last_step or report.digests:
            counts = {"samples": report.samples, "tokens": report.tokens, "step_s": report.step_s}
            skipped = {"skipped": True} if report.is_skipped else {}
            self._log.write({**self._where(step), **values, **counts, **skipped, **report.digests, **self._ranks})
            self._ranks = {}
        self._since_tracked.append(report)
        if step % self._track_every == 0 or step == self._last_step:
            self._trackers.log({**values, **_speed(self._since_tracked), "memory_bytes": _peak_memory_bytes()}, step)
            self._since_tracked.clear()

    def _say_bad(self, step: int, logged: Mapping[str, float]) -> None:
        """Say which logged values are not finite, each once."""
        for name, value in logged.items():
            if not math.isfinite(value) and name not in self._bad:
                self._bad.add(name)
                self._display.warn(
                    f"{TRAIN_PREFIX}{name} is {value} at step {step}: what the recipe logs is not finite there, or has "
                    f"no count (said once; metrics.jsonl has all)"
                )

    def on_left_out(self, step: int) -> None:
        """Record a step whose global batch the run does not train on."""
        if self._log is not None:
            self._log.write({**self._where(step), "left_out": True})

    def on_evaluating(self, num_done: int, num_samples: int) -> None:
        """Show how far an evaluation is."""
        if self._progress is not None:
            self._progress.evaluating(num_done, num_samples)

    def on_evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        """Record the results of an evaluation by their names in metrics.jsonl: numbers, and lists of them."""
        if self._log is not None and self._trackers is not None:
            self.last_evaluation = {**self._where(step), **results}
            self._log.write(self.last_evaluation)
            self._trackers.log(numbers(results), step)
        for prefix, what in ((EVAL_PREFIX, "evaluation"), (EMA_PREFIX, "evaluation of the average")):
            shown = [
                f"{name.removeprefix(prefix)} {value:.4f}"
                for name, value in numbers(results).items()
                if name.startswith(prefix)
            ]
            if shown:
                self._display.say(f"{what} at step {step}: " + "  ".join(shown))

    def on_medium(self, step: int, medium: Medium) -> None:
        """Keep a picture, text or table of a step in the run's folder, and show it in the trackers."""
        if self._log is None or self._trackers is None:
            return
        folder = self._log.path.parent / MEDIA / f"step-{step:08d}"
        try:
            make_folder(folder)
            replace_file(folder / file_name(medium), medium.data())
        except (OSError, UserError) as error:
            self._display.warn(f"{medium.name!r} of step {step} is not kept in {folder}: {error_text(error)}")
        self._trackers.show(medium, step)

    def sync(self) -> None:
        """Make what was written durable. Raises OSError."""
        if self._log is not None:
            self._log.sync()

    def _where(self, step: int) -> dict[str, float]:
        return {"step": step, "epoch": step / self._steps_per_epoch}


def _speed(reports: Sequence[StepReport]) -> dict[str, float]:
    """Return the throughput over some steps, of all ranks together, and the mean time of a step."""
    seconds = max(sum(report.step_s for report in reports), 1e-9)
    num_tokens = sum(report.tokens for report in reports)
    tokens = {"tokens_per_s": num_tokens / seconds} if num_tokens else {}
    num_samples = sum(report.samples for report in reports)
    return {"step_s": seconds / len(reports), "samples_per_s": num_samples / seconds, **tokens}


def _peak_memory_bytes() -> int:
    """Return the most memory that this rank has had in use: of its GPU's, or of the machine's where it has none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024

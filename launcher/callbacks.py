"""Hooks of a run, as methods of a recipe or of callbacks, and what they are told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting import media

HookT = TypeVar("HookT", bound=Callable[..., None])


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a hook is told: but for `is_main` the same on all ranks, on any number of them, and after a resume."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole run."""
    epoch: int
    """Passes over the training data that are complete."""
    samples: int
    """Samples that the run has consumed, on all ranks together."""
    metrics: Mapping[str, Any]
    """Of the step, or of the last evaluation, under their names in metrics.jsonl."""
    run_dir: Path
    """Output folder of the run."""
    checkpoint: Path | None
    """The folder that has been saved; at the start, the one resumed from; at the end, the last one."""
    is_main: bool
    """Whether this is rank 0, which alone is to write files and to send messages (`main_only`)."""
    is_finished: bool
    """Whether the run is complete: at its end, if not stopped by --stop-at-step."""
    is_skipped: bool
    """Whether the update of the step was skipped, because of a bad loss or gradient."""
    model: nn.Module
    """The model as the strategy has it: call it on all ranks or none, and do not change it."""
    options: Options
    say: Callable[[str], None]
    """Prints a line, on rank 0 alone."""
    show: Callable[[media.Medium], None]

    def log_image(self, name: str, image: Any) -> None:
        """Show a picture in the trackers, and keep it in the run's folder. All ranks, or rank 0.

        `image` is an image of PIL, a figure of matplotlib, an array (height, width, channels) or a tensor (channels,
        height, width), of uint8 or of numbers from 0 to 1; channels may be missing. Raises UserError for anything else.
        """
        self.show(media.picture(name, image))

    def log_text(self, name: str, text: str) -> None:
        """Show a text in the trackers, and keep it in the run's folder. All ranks, or rank 0."""
        self.show(media.text(name, text))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in the trackers, and keep it in the run's folder. All ranks, or rank 0.

        Cells are texts and numbers. Raises UserError for others, and for a row of another length.
        """
        self.show(media.table(name, columns, rows))


class RunHooks:
    """Methods that a run calls on all ranks, in the main thread, between its steps; by default they do nothing.

    They may not change the model, the optimizer or anything that the training depends on. One that fails ends the run
    after the next step, which is saved.
    """

    def on_start(self, event: Event) -> None:
        """Called before the first step of each start of a run that is not complete."""

    def after_update(self, event: Event) -> None:
        """Called after each step. `event.metrics` has its loss, learning rate, gradient norm and `train/...`."""

    def on_evaluation(self, event: Event) -> None:
        """Called after each evaluation, with the model in evaluation mode. `event.metrics` has `eval/...`."""

    def on_save(self, event: Event) -> None:
        """Called on rank 0 alone, when `event.checkpoint` is complete: some steps later if it was saved beside them."""

    def on_end(self, event: Event) -> None:
        """Called when the training has come to its end, or to --stop-at-step, and all is saved."""


class Callback(RunHooks):
    """Base class of callbacks: hooks apart from a recipe, for `--callback module:Class` or `fit(callbacks=[...])`."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: what JSON holds (texts, numbers, lists, dictionaries), up to 1 MiB.

        That of rank 0 is saved with each checkpoint.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state of `state_dict` back, on all ranks: at a resume, or when the run goes back to a checkpoint."""


def main_only(hook: HookT) -> HookT:
    """Let a hook do its work on rank 0 alone: for what writes files or sends messages, and does not call the model."""

    @wraps(hook)
    def on_main(self: Any, event: Event) -> None:
        if event.is_main:
            hook(self, event)

    return on_main  # type: ignore[return-value]

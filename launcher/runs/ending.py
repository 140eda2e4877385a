"""The last lines of a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.files import error_text, is_transient, retried
from shardlaunch.checkpoints.records import Position
from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.summary import say_end
from shardlaunch.launcher.runs.result import Result


def result_of(output_dir: Path, position: Position, *, last: Path | None, warn: Callable[[str], None]) -> Result:
    """Return the result of a run that is over; if its files cannot be read now, without what stands in them."""
    try:
        return retried(lambda: Result.of_folder(output_dir, last=last))
    except (OSError, UserError) as error:
        if isinstance(error, UserError) and not is_transient(error):
            raise
        warn(f"the run is over, but its evaluations cannot be read to be shown: {error_text(error)}")
        return Result(run_dir=output_dir, step=position.step, is_finished=position.is_finished, last_checkpoint=last)


def show_result(display: Display, result: Result, recipe: Recipe, *, best_step: int) -> None:
    """Print the last evaluation, the best and the last checkpoint, how to use the model."""
    metrics = recipe.metrics() if result.evaluations else {}
    best = ""
    if result.best_value is not None:
        kept = result.best_checkpoint or "its checkpoint is not kept in this folder"
        best = f"{result.best_metric} {result.best_value:.4f} at step {best_step}: {kept}"
    shown = result.best_checkpoint or result.last_checkpoint
    say_end(
        display,
        evaluation=result.evaluations[-1] if result.evaluations else {},
        class_names=recipe.class_names,
        confusions=confusion_names(metrics),
        signatures={name: metric.signature for name, metric in metrics.items() if hasattr(metric, "signature")},
        best=best,
        last=result.last_checkpoint,
        usage=recipe.usage(shown) if shown is not None else "",
    )


def confusion_names(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics that are confusion matrices."""
    return [name for name, metric in metrics.items() if "ConfusionMatrix" in type(metric).__name__]

"""The last lines of a run."""

from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.summary import say_end
from shardlaunch.launcher.runs.result import Result


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
        confusions=[name for name, metric in metrics.items() if "ConfusionMatrix" in type(metric).__name__],
        signatures={name: metric.signature for name, metric in metrics.items() if hasattr(metric, "signature")},
        best=best,
        last=result.last_checkpoint,
        usage=recipe.usage(shown) if shown is not None else "",
    )

"""The summary at the start of a run and the report at its end."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardlaunch.errors import some
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.tracking import EMA_PREFIX, numbers


def batch_text(*, global_batch: int, micro_batch: int, ranks: int, replicas: int, model_ranks: int = 1) -> str:
    """Return how a global batch is spread over `replicas` models.

    There is one per rank, one per GPU of a single process, or one per group of `model_ranks` ranks.
    """
    num_micro_batches = global_batch // micro_batch
    accumulation = -(-num_micro_batches // replicas)
    holders = "rank" if replicas == 1 else "ranks" if ranks > 1 else "replicas"
    if model_ranks > 1:
        holders = f"group{'s' * (replicas > 1)} of {model_ranks} ranks"
    uneven = ", the last round not full" if num_micro_batches % replicas else ""
    return f"{global_batch} = micro-batch {micro_batch} x accumulation {accumulation} x {replicas} {holders}{uneven}"


def say_start(
    display: Display,
    rows: Mapping[str, str],
    *,
    new: Sequence[str],
    num_tensors: int,
    origins: Sequence[Sequence[str]],
) -> None:
    """Print the table of a run's start, which tensors are new beside pretrained ones, and their origins by module."""
    display.summary(rows)
    if 0 < len(new) < num_tensors:
        display.say(f"newly initialized: {some(new)}")
    if origins:
        display.columns(("tensors of the model", "pretrained", "as constructed", "newly drawn"), origins)


def say_init(
    display: Display,
    source: str,
    rows: Sequence[Sequence[str]],
    *,
    other_shapes: Mapping[str, str],
    unused: Sequence[str],
    renaming: str,
) -> None:
    """Print how the weights of --init-from matched the model: one row per part of it, and what was not loaded."""
    display.say(f"weights from {source}{f', names {renaming}' if renaming else ''}:")
    display.columns(("part of the model", "loaded", "other shape", "absent"), rows)
    if other_shapes:
        display.warn(
            f"not loaded, the shape differs: {some(f'{name} ({both})' for name, both in other_shapes.items())}"
        )
    if unused:
        display.warn(f"not used, no such name in the model: {some(unused)}")


def say_end(
    display: Display,
    *,
    evaluation: Mapping[str, Any],
    class_names: Sequence[str],
    confusions: Collection[str],
    signatures: Mapping[str, str],
    best: str,
    last: Path | None,
    usage: str,
) -> None:
    """Print the last evaluation, the best and the last checkpoint, and how to use the model.

    `confusions` are the metrics that are confusion matrices: a row per true class, a column per predicted one.
    """
    if evaluation:
        results = {name: value for name, value in evaluation.items() if name not in ("step", "epoch")}
        display.table(f"evaluation at step {evaluation['step']}", numbers(results))
        for name, value in results.items():
            if isinstance(value, list):
                display.matrix(
                    name, value, classes=class_names, is_confusion=name.removeprefix(EMA_PREFIX) in confusions
                )
        for name, signature in signatures.items():
            display.say(f"{name:<6} {signature}")
    if best:
        display.say(f"best   {best}")
    if last is not None:
        display.say(f"last   {last}")
    if usage:
        display.say(f"use    {usage}")

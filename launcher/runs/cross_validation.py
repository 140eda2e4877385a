"""K-fold cross-validation: one run per fold, one after the other, and a summary of their evaluations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX, EVAL_PREFIXES, last_evaluation, numbers
from shardlaunch.launcher.runs.folder import RUN, write_json
from shardlaunch.launcher.runs.result import FOLDS, Result
from shardlaunch.launcher.runs.run import Run


def cross_validate(run_of_fold: Callable[[int], Run], num_folds: int) -> Result:
    """Run each fold in its own folder, show mean and standard deviation over the folds, return the outcome. All ranks.

    Complete folds are not run again, the others resume. Raises UserError if the folder holds a run without folds.
    """
    evaluations = []
    for fold in range(num_folds):
        run = run_of_fold(fold)
        root, display, world = run.output_dir.parent, run.display, run.world
        if (root / RUN).exists():
            raise UserError(f"--output-dir {root}: holds a run without --folds. Choose another folder.")
        run.run()
        if run.position.is_finished:
            evaluations.append(last_evaluation(run.output_dir))
    if len(evaluations) < num_folds:
        done = f"{len(evaluations)} of {num_folds} folds are complete"
        display.say(f"{done}; the same command without --stop-at-step runs the rest")
        return Result.of_folder(root)
    summary = summarize(evaluations)
    partial = sorted({name for evaluation in evaluations for name in _names(evaluation)} - summary.keys())
    if partial:
        display.warn(f"not all folds have the same metrics; omitted: {', '.join(partial)}")
    world.peers.together(
        lambda: write_json(root / FOLDS, {"folds": evaluations, "summary": summary}) if world.is_main else None
    )
    rows = [
        (name.removeprefix(EVAL_PREFIX), f"{found['mean']:.4f}", f"{found['std']:.4f}")
        for name, found in summary.items()
    ]
    display.columns(("metric", f"mean of {num_folds} folds", "standard deviation"), rows)
    display.say(f"folds  {root / FOLDS}")
    return Result.of_folder(root)


def summarize(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and sample standard deviation (n - 1) of each metric that all folds have, from their last evaluation.

    Both are NaN if a fold's value is.
    """
    names = [name for name in _names(evaluations[0]) if all(name in _names(other) for other in evaluations)]
    columns = {name: np.array([evaluation[name] for evaluation in evaluations]) for name in names}
    with np.errstate(invalid="ignore"):  # an infinite perplexity has no standard deviation
        return {name: {"mean": float(c.mean()), "std": float(c.std(ddof=1))} for name, c in columns.items()}


def _names(evaluation: Mapping[str, Any]) -> list[str]:
    return [name for name in numbers(evaluation) if name.startswith(EVAL_PREFIXES)]

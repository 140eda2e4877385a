"""The outcome of a run, read from its output folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlaunch.checkpoints.layout import CHECKPOINTS, step_dir_name
from shardlaunch.checkpoints.reader import newest_complete, position_of
from shardlaunch.checkpoints.records import Position
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX, is_evaluation, read_metrics

if TYPE_CHECKING:
    import pandas as pd

FOLDS = "folds.json"
"""Summary of a cross-validation, written when all folds are finished."""
_FOLD_DIR = re.compile(r"fold-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of a run: output folder, step, evaluations and checkpoints."""

    run_dir: Path
    step: int
    is_finished: bool
    evaluations: tuple[dict[str, Any], ...] = ()
    """Each evaluation's `step`, `epoch`, `loss` and metrics, by step; those of the average begin with `eval_ema/`."""
    last_checkpoint: Path | None = None
    best_checkpoint: Path | None = None
    """Checkpoint of the best evaluation, if it is kept in this folder."""
    best_metric: str = ""
    best_value: float | None = None
    folds: tuple["Result", ...] = ()
    """Results of the folds of a cross-validation."""

    @classmethod
    def of_folder(cls, run_dir: Path, *, last: Path | None = None) -> "Result":
        """Return the result of the run in a folder, finished or not.

        `last` is the checkpoint that the run is at (default: the newest complete one in the folder).
        """
        folds = _fold_dirs(run_dir)
        if folds and not (run_dir / CHECKPOINTS).is_dir():
            results = tuple(cls.of_folder(folder) for folder in folds)
            return cls(
                run_dir=run_dir,
                step=sum(result.step for result in results),
                is_finished=(run_dir / FOLDS).exists() and all(result.is_finished for result in results),
                folds=results,
            )
        lines = read_metrics(run_dir)
        evaluations = tuple(
            {name.removeprefix(EVAL_PREFIX): value for name, value in line.items()}
            for line in lines
            if is_evaluation(line)
        )
        last = last or newest_complete(run_dir / CHECKPOINTS)
        position = position_of(last) if last is not None else Position()
        best = run_dir / CHECKPOINTS / step_dir_name(position.best_step)
        has_best = position.best_value is not None
        return cls(
            run_dir=run_dir,
            step=position.step,
            is_finished=position.is_finished,
            evaluations=evaluations,
            last_checkpoint=last,
            best_checkpoint=best if has_best and best.is_dir() else None,
            best_metric=position.best_metric if has_best else "",
            best_value=position.best_value,
        )

    def history(self) -> "pd.DataFrame":
        """Return metrics.jsonl as a table, one row per logged or evaluated step.

        Metrics of evaluations begin with `eval/`, those of the average of the weights with `eval_ema/`.
        For a cross-validation, the rows of all folds, with a column `fold` (from 1).
        """
        import pandas as pd

        if self.folds:
            tables = [result.history().assign(fold=number) for number, result in enumerate(self.folds, start=1)]
            return pd.concat(tables, ignore_index=True)
        rows: dict[int, dict[str, Any]] = {}
        for line in read_metrics(self.run_dir):
            rows.setdefault(line["step"], {}).update(line)
        return pd.DataFrame([rows[step] for step in sorted(rows)])


def _fold_dirs(run_dir: Path) -> list[Path]:
    """Return the folders of the folds of a cross-validation, by number."""
    numbers = {int(match[1]): path for path in run_dir.glob("fold-*") if (match := _FOLD_DIR.fullmatch(path.name))}
    return [numbers[number] for number in sorted(numbers)]

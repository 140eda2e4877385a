"""`shardlaunch predict --data`: predictions for each row of a table, written as a table with all of its columns."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.files import error_text, fsync, make_folder
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.predict import open_classifier
from shardlaunch.launcher.runs.session import silent_libraries
from shardlaunch.launcher.toolkit.columns import require_texts
from shardlaunch.launcher.toolkit.datasets import load_source
from shardlaunch.launcher.toolkit.files import FileOptions, paths_of

LABEL, VALUE, SCORE = "predicted_label", "predicted_value", "score_"
_WRITERS: Mapping[str, Callable[[Any, str], Any]] = {
    ".csv": lambda rows, path: rows.to_csv(path, index=False),
    ".jsonl": lambda rows, path: rows.to_json(path, force_ascii=False),
    ".parquet": lambda rows, path: rows.to_parquet(path),
}


def predict_rows(path: Path, *, data: str, text_column: str, output: Path | None, ema: bool) -> None:
    """Write the rows of `data` with the label and the score of each class, or with the number of a regression.

    Raises UserError for data without the column of texts, and for an `output` that exists or is of an unknown kind.
    """
    if output is None:
        raise UserError("--data: needs --output FILE, a .csv, .jsonl or .parquet file")
    target = output.expanduser()
    if target.suffix.lower() not in _WRITERS:
        raise UserError(f"--output {output}: must end in {', '.join(_WRITERS)}")
    if os.path.lexists(target):
        raise UserError(f"--output {output}: exists; choose another file")
    with silent_libraries():
        classifier = open_classifier(path, ema=ema)
        column = text_column or str(classifier.checkpoint.recipe.options.get("text_column") or "text")
        rows = _rows(data)
        if column not in rows.column_names:
            raise UserError(
                f"--data {data}: no column {column!r}; it has {', '.join(map(repr, rows.column_names))}. Choose with "
                f"--text-column NAME"
            )
        require_texts({"given": rows}, column, source=data, called=column)
        added = [VALUE] if classifier.is_regression else [LABEL, *(f"{SCORE}{name}" for name in classifier.labels)]
        if taken := [name for name in added if name in rows.column_names]:
            raise UserError(f"--data {data}: has a column {taken[0]!r} already; rename it")
        found = list(classifier.predictions(rows[column][:]))
        if classifier.is_regression:
            rows = rows.add_column(VALUE, [row[0] for row in found])
        else:
            chosen = [classifier.chosen(row) for row in found]
            is_list = classifier.has_several_labels and target.suffix.lower() != ".csv"  # whose cells are text
            rows = rows.add_column(LABEL, chosen if is_list else [", ".join(labels) for labels in chosen])
            for number, name in enumerate(added[1:]):
                rows = rows.add_column(name, [row[number] for row in found])
        _write(rows, target)
    print(f"{target}: {len(rows):,} rows, with {', '.join(added)}")


def _rows(data: str) -> Any:
    """Return the rows of one table, of text as it is written where its cells have no types. Raises UserError."""
    splits = load_source(data, None, FileOptions())
    if len(splits) > 1:
        raise UserError(f"--data {data}: has {', '.join(splits)}; give one file")
    (rows,) = splits.values()
    if any({".csv", ".tsv"} & {*path.suffixes} for path in paths_of(data)):
        (rows,) = load_source(data, dict.fromkeys(rows.column_names, "text"), FileOptions()).values()
    return rows


def _write(rows: Any, target: Path) -> None:
    """Write rows, as a whole or not at all."""
    staged = target.with_name(f".{target.name}.part")
    try:
        make_folder(target.absolute().parent)
        _WRITERS[target.suffix.lower()](rows, str(staged))
        fsync(staged)
        staged.rename(target)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written: {error_text(error)}") from error
    finally:
        staged.unlink(missing_ok=True)

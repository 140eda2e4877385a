"""Several labels per row: lists of them, one text, or a column of 0 and 1 per label."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.mixture import of_training


def labels_of_lists(
    splits: Mapping[str, Any], *, source: str, called: str, separator: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Return the splits with `label` as one 0 or 1 per class (float32), and the names of the classes.

    The column `label`, called `called` in --data `source`, has lists of names or numbers, or texts with a separator
    between names, of which a missing one has none. The classes are those of its ClassLabel type, else those of the
    training data. Raises UserError for other values, and for a label that the training data has not.
    """
    found, declared = {}, {}
    for name, split in splits.items():
        where = f"--data {source}: row {{row}} of the {name} data"
        declared[name] = list(getattr(getattr(split.features["label"], "feature", None), "names", None) or ())
        found[name] = [
            _labels(value, where.format(row=row), called, separator, declared[name])
            for row, value in enumerate(split["label"][:], start=1)
        ]
    names: list[str] = next((names for names in of_training(declared) if names), [])
    in_training = {label for rows in of_training(found) for labels in rows for label in labels}
    if len({type(label) for rows in found.values() for labels in rows for label in labels}) > 1:
        raise UserError(f"--data {source}: column {called!r} has names in some rows and numbers in others; make it one")
    classes: list[Any] = names or sorted(in_training)
    if len(classes) < 2:
        raise UserError(
            f"--data {source}: the training data has {some(map(repr, classes)) or 'no label'} in column {called!r}; at "
            f"least two are required"
        )
    if absent := [label for label in classes if label not in in_training]:
        current().warnings.append(f"no row of the training data has {some(map(repr, absent))} in column {called!r}")
    known = set(classes)
    for name, rows in found.items():
        for row, labels in enumerate(rows, start=1):
            if unknown := [label for label in labels if label not in known]:
                raise UserError(
                    f"--data {source}: row {row} of the {name} data has the label {unknown[0]!r}, which the training "
                    f"data has not; its labels are {some(map(repr, classes), 12)}"
                )
    return {
        name: _with_labels(split, np.array([[label in labels for label in classes] for labels in found[name]]))
        for name, split in splits.items()
    }, [str(label) for label in classes]


def _labels(value: Any, where: str, called: str, separator: str, names: Sequence[str]) -> set[Any]:
    if separator:
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {called!r} is not a text, so that --label-separator has no use; remove it")
        return {part.strip() for part in (value or "").split(separator)} - {""}
    if isinstance(value, str):
        raise UserError(f"{where}: {called!r} is a text; say what is between labels: --label-separator ';'")
    is_list = isinstance(value, list) and all(isinstance(one, str | int) and not isinstance(one, bool) for one in value)
    if not is_list:
        raise UserError(f"{where}: {called!r} is not a list of labels, but {value!r}"[:300])
    if names and not all(0 <= label < len(names) for label in value):
        raise UserError(f"{where} has the label {max(value, key=abs)}; labels are 0 to {len(names) - 1}")
    return {names[label] if names else label for label in value}


def require_columns(splits: Mapping[str, Any], columns: Sequence[str], *, source: str) -> None:
    """Raise UserError for a column of --label-columns that a split lacks."""
    for name, split in splits.items():
        if missing := [column for column in columns if column not in split.column_names]:
            raise UserError(
                f"--label-columns {missing[0]}: --data {source}: the {name} data has no such column; it has "
                f"{', '.join(map(repr, split.column_names))}"
            )


def labels_of_columns(splits: Mapping[str, Any], columns: Sequence[str], *, source: str) -> dict[str, Any]:
    """Return the splits with `label` made of columns that are 0 or 1. Raises UserError for other values."""
    found = {}
    for name, split in splits.items():
        table = np.zeros((len(split), len(columns)), dtype=bool)
        for number, column in enumerate(columns):
            for row, value in enumerate(split[column][:]):
                if value not in (0, 1):
                    raise UserError(
                        f"--data {source}: row {row + 1} of the {name} data has {value!r} for {column!r}; it must be "
                        f"0 or 1"
                    )
                table[row, number] = value
        never = [column for number, column in enumerate(columns) if not table[:, number].any()]
        if name == "train" and never:
            current().warnings.append(f"no row of the training data has 1 in {some(map(repr, never))}")
        found[name] = _with_labels(split.remove_columns(list(columns)), table)
    return found


def _with_labels(split: Any, table: np.ndarray) -> Any:
    import datasets
    import xxhash

    features = datasets.Features(
        {**{c: f for c, f in split.features.items() if c != "label"}, "label": datasets.List(datasets.Value("float32"))}
    )
    rows = table.astype(np.float32)
    return derived(
        split,
        lambda _, numbers: {"label": [*rows[numbers]]},
        key=("several labels", xxhash.xxh3_128_hexdigest(rows.tobytes()), rows.shape),
        input_columns=["text"],
        with_indices=True,
        features=features,
    )

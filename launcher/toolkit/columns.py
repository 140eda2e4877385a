"""Columns of data sets: selecting those that a recipe uses, checking texts, numbering class labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.toolkit.datasets import derived


def select_columns(splits: Mapping[str, Any], columns: Mapping[str, str], *, source: str) -> dict[str, Any]:
    """Return the splits with only the columns that the recipe uses: `columns` maps its names to the data's.

    Raises UserError when a split of --data `source` lacks a column, when two columns are the same, and when a split has
    no rows. The message names the option, such as --text-column for `text`.
    """
    if len(set(columns.values())) < len(columns):
        options = " and ".join(map(_column_option, columns))
        raise UserError(f"{options}: must be different columns, not {', '.join(map(repr, columns.values()))}")
    chosen = {}
    for name, split in splits.items():
        missing = {role: column for role, column in columns.items() if column not in split.column_names}
        if missing:
            raise UserError(
                f"--data {source}: the {name} data has no column {' and no column '.join(map(repr, missing.values()))};"
                f" it has {', '.join(map(repr, split.column_names))}. "
                f"Choose with {' '.join(f'{_column_option(role)} NAME' for role in missing)}"
            )
        if len(split) == 0:
            raise UserError(f"--data {source}: the {name} data has no rows")
        renamed = {column: role for role, column in columns.items() if column != role}
        split = split.select_columns(list(columns.values()))
        chosen[name] = split.rename_columns(renamed) if renamed else split
    return chosen


def _column_option(role: str) -> str:
    return f"--{role.replace('_', '-')}-column"


def require_texts(splits: Mapping[str, Any], column: str = "text", *, source: str, called: str = "text") -> None:
    """Raise UserError when a row of --data `source` has no text in a column, which is named `called` there."""
    for name, split in splits.items():
        kind = split.features[column]
        if getattr(kind, "dtype", None) not in ("string", "large_string") or split.data.column(column).null_count:
            raise UserError(f"--data {source}: the {name} data has rows whose {called!r} is missing or not text")


def class_names(
    splits: Mapping[str, Any], column: str = "label", *, source: str, called: str = "label"
) -> tuple[dict[str, Any], list[str]]:
    """Return the splits with labels 0..K-1, and the K class names. Raises UserError for invalid labels.

    The classes are those of the column's ClassLabel type, else the sorted values of the training data (numbers or
    strings). `called` is the column's name in --data `source`.
    """
    import datasets

    splits = dict(splits)
    kinds = {name: getattr(split.features[column], "dtype", None) for name, split in splits.items()}
    if all(kind == "bool" for kind in kinds.values()):
        splits = {name: split.cast_column(column, datasets.Value("int64")) for name, split in splits.items()}
    feature = splits["train"].features[column]
    refusal = f"--data {source}: column {called!r} must hold class labels (integers or text), not {feature}"
    if None in kinds.values():
        raise UserError(refusal)
    values = {name: split.unique(column) for name, split in splits.items()}
    for name, found in values.items():
        if any(value is None for value in found):
            raise UserError(f"--data {source}: the {name} data has rows without a {called!r}")
        other = splits[name].features[column]
        has_other_names = getattr(other, "names", None) != getattr(feature, "names", None)
        if has_other_names or {*map(type, found)} != {type(values["train"][0])}:
            raise UserError(
                f"--data {source}: the classes differ: column {called!r} is {feature} in the training data, "
                f"{other} in the {name} data"
            )
    if len(values["train"]) < 2:
        raise UserError(
            f"--data {source}: all rows of the training data have the {called!r} {values['train'][0]!r}; at least two "
            f"classes are required"
        )
    if not all(isinstance(value, str | int | np.integer) for value in values["train"]):
        raise UserError(refusal)
    has_names = isinstance(feature, datasets.ClassLabel)
    classes = list(range(len(feature.names))) if has_names else sorted(values["train"])
    known = set(classes)
    for name, found in values.items():
        unknown = [value for value in found if value not in known or (not isinstance(value, str) and value < 0)]
        if unknown:
            raise UserError(
                f"--data {source}: labels out of range: {min(unknown)!r} in the {name} data; labels must be text or "
                f"numbers from 0, and those of the training data are {some(map(repr, classes))}"
            )
    if classes != list(range(len(classes))):
        splits = {name: _numbered(split, column, classes) for name, split in splits.items()}
    return splits, list(feature.names) if has_names else [str(value) for value in classes]


def _numbered(split: Any, column: str, classes: Sequence[Any]) -> Any:
    """Return a data set with each label replaced by its index among the classes."""
    import datasets

    position = {label: number for number, label in enumerate(classes)}
    return derived(
        split,
        lambda labels: {column: [position[label] for label in labels]},
        input_columns=[column],
        key=("class numbers", column, *classes),
        features=datasets.Features({**split.features, column: datasets.Value("int64")}),
    )


def class_weights(texts: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> torch.Tensor | None:
    """Return one weight per class (float32) from --class-weights: numbers, or `balanced`. None: no weights.

    `labels` are the training data's. Balanced weights are inversely proportional to the classes' numbers of samples;
    their mean over the training data is 1, so that the loss keeps its scale. Raises UserError for other values.
    """
    if not texts:
        return None
    if tuple(texts) == ("balanced",):
        counts = np.bincount(labels, minlength=len(names))
        return torch.from_numpy(len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))).float()
    try:
        weights = torch.tensor([float(text) for text in texts])
    except ValueError:
        weights = torch.empty(0)
    if len(weights) != len(names) or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
        raise UserError(
            f"--class-weights {' '.join(texts)}: must be balanced, or {len(names)} numbers of at least 0, one for each "
            f"of {some(map(repr, names))}"
        )
    return weights

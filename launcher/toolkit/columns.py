"""Columns of data sets: selecting those that a recipe uses, checking texts, numbering class labels."""

import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.notes import MOST_EXAMPLES, current, excerpt
from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.mixture import of_training


def column_kinds(columns: Mapping[str, str], **kinds: ColumnKind) -> dict[str, ColumnKind]:
    """Return the kind of each column of the data, for `load_splits`; `columns` maps the recipe's names to the data's.

    Raises UserError when two of the columns are the same.
    """
    _require_different(columns)
    return {columns[name]: kind for name, kind in kinds.items()}


def _require_different(columns: Mapping[str, str]) -> None:
    if len(set(columns.values())) < len(columns):
        options = " and ".join(map(_column_option, columns))
        raise UserError(f"{options}: must be different columns, not {', '.join(map(repr, columns.values()))}")


def select_columns(splits: Mapping[str, Any], columns: Mapping[str, str], *, source: str) -> dict[str, Any]:
    """Return the splits with only the columns that the recipe uses: `columns` maps its names to the data's.

    Raises UserError when a split of --data `source` lacks a column, when two columns are the same, and when a split has
    no rows. The message names the option, such as --text-column for `text`.
    """
    _require_different(columns)
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
    notes = current()
    notes.columns = ", ".join(role if role == column else f"{role}: {column!r}" for role, column in columns.items())
    first = chosen["train"].select(range(min(MOST_EXAMPLES, len(chosen["train"]))))
    notes.examples = [" | ".join(_shown(row[role]) for role in columns) for row in _undecoded(first)]
    return chosen


def _undecoded(dataset: Any) -> list[dict[str, Any]]:
    """Return rows with images and sounds as they are stored, and classes by name."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    names = {name: feature for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)}
    return [
        {
            name: names[name].int2str(value) if name in names and value is not None else value
            for name, value in row.items()
        }
        for row in dataset
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return str(value["path"] or f"file of {len(value['bytes'] or b''):,} bytes")
    return excerpt(value)


def _column_option(role: str) -> str:
    return f"--{role.replace('_', '-')}-column"


def require_texts(splits: Mapping[str, Any], column: str = "text", *, source: str, called: str = "text") -> None:
    """Raise UserError when a row of --data `source` has no text in a column, which is named `called` there."""
    for name, split in splits.items():
        kind = split.features[column]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise UserError(f"--data {source}: column {called!r} of the {name} data must hold texts, not {kind}")
        texts = split.with_format("arrow", columns=[column])[:][column]
        if texts.null_count:
            row = texts.is_null().index(True).as_py()
            raise UserError(f"--data {source}: row {row} of the {name} data has no text {called!r}")


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
        splits = {name: _numbered(split, column, [False, True]) for name, split in splits.items()}
    feature = splits["train"].features[column]
    refusal = f"--data {source}: column {called!r} must hold class labels (integers or text), not {feature}"
    if None in kinds.values():
        raise UserError(refusal)
    values = {name: _unique(split, column) for name, split in splits.items()}
    in_training = [*dict.fromkeys(value for found in of_training(values) for value in found)]
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
    if len(in_training) < 2:
        raise UserError(
            f"--data {source}: all rows of the training data have the {called!r} {in_training[0]!r}; at least two "
            f"classes are required"
        )
    if not all(isinstance(value, str | int | np.integer) for value in in_training):
        raise UserError(refusal)
    has_names = isinstance(feature, datasets.ClassLabel)
    classes = list(range(len(feature.names))) if has_names else sorted(in_training)
    known = set(classes)
    for name, found in values.items():
        unknown = [value for value in found if value not in known or (not isinstance(value, str) and value < 0)]
        if unknown:
            raise UserError(
                f"--data {source}: labels out of range: {min(unknown)!r} in the {name} data; labels must be text or "
                f"numbers from 0, and those of the training data are {some(map(repr, classes))}"
            )
    _warn_of_alike(list(feature.names) if has_names else classes, called, source)
    if classes != list(range(len(classes))):
        splits = {name: _numbered(split, column, classes) for name, split in splits.items()}
    return splits, list(feature.names) if has_names else [str(value) for value in classes]


def _unique(split: Any, column: str) -> list[Any]:
    """Return the values of a column, in the order in which they appear."""
    found: list[Any] = split.with_format("arrow", columns=[column])[:][column].unique().to_pylist()
    return found


def _warn_of_alike(classes: Sequence[Any], called: str, source: str) -> None:
    """Warn of names of classes that differ in case, blanks or the way that a number is written only."""
    alike: dict[str, list[str]] = {}
    for name in filter(lambda name: isinstance(name, str), classes):
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        with suppress(ValueError):
            plain = repr(float(plain))
        alike.setdefault(plain, []).append(name)
    for names in alike.values():
        if len(names) > 1:
            current().warnings.append(
                f"--data {source}: {some(map(repr, names))} of column {called!r} are different classes; are they meant "
                f"to be one?"
            )


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

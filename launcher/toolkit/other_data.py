"""Other data in place of a run's own evaluation data, for `shardlaunch evaluate --data`.

The training data stays the run's: from it come classes, vocabularies and weights of classes, as in the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.files import GROUP, HELD_OUT, FileOptions, paths_of

_OF_CSV = (".csv", ".tsv")


@dataclass(kw_only=True)
class OtherData:
    """Which rows to evaluate on."""

    source: str
    split: str = ""
    is_used: bool = field(default=False)
    """Whether the recipe has read them."""


_CURRENT: ContextVar[OtherData | None] = ContextVar("other data", default=None)


@contextmanager
def evaluated_on(other: OtherData) -> Iterator[None]:
    """Let what loads the splits of a recipe give it other evaluation data, all rows of one split of theirs."""
    token = _CURRENT.set(other)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def with_other_rows(
    splits: Mapping[str, Any],
    *,
    columns: Mapping[str, ColumnKind] | None = None,
    options: FileOptions | None = None,
    of_texts: bool = False,
) -> dict[str, Any]:
    """Return a run's splits, in an evaluation on other data with these as `eval`.

    Raises UserError where they lack a column, or have a label that the training data has not.
    """
    rows = other_rows(columns=columns, options=options, of_texts=of_texts)
    if rows is None:
        return dict(splits)
    source, train = other_source(), splits["train"]
    for name, kind in (columns or {}).items():
        if name not in rows.column_names or name not in train.column_names:
            continue
        feature, there = train.features[name], rows.features[name]
        if hasattr(feature, "names") and feature != there:
            rows = numbered(rows, name, feature.names, source=source, feature=feature)
        elif kind == "label":
            if "string" in str(feature.dtype) and "int" in str(there.dtype):  # text, which is all of digits here
                rows = rows.cast_column(name, feature)
            known = _values(train, name)
            _refuse_unknown(_values(rows, name), known, name, source)
    if GROUP in train.column_names and GROUP not in rows.column_names:  # which only divides training data
        rows = rows.add_column(GROUP, np.zeros(len(rows), dtype=np.int64), new_fingerprint=f"{rows._fingerprint}-group")
    return {"train": train, "eval": rows}


def other_rows(
    *, columns: Mapping[str, ColumnKind] | None, options: FileOptions | None, of_texts: bool = False
) -> Any | None:
    """Return the rows to evaluate on in place of a run's own, None where they are the run's own."""
    from shardlaunch.launcher.toolkit.datasets import load_source

    other = _CURRENT.get()
    if other is None:
        return None
    other.is_used = True
    of_run = options or FileOptions()
    paths = paths_of(other.source)
    are_csv = bool(paths) and all({*path.suffixes} & {*_OF_CSV} for path in paths)
    # Options on how a file is written are those of the run, where they can be of these files at all.
    options = replace(FileOptions(), delimiter=of_run.delimiter, encoding=of_run.encoding) if are_csv else FileOptions()
    splits = load_source(other.source, columns, options, of_texts=of_texts)
    rows = splits[chosen_split(tuple(splits), other)]
    missing = [name for name, kind in (columns or {}).items() if kind != "any" and name not in rows.column_names]
    if missing:
        raise UserError(
            f"--data {other.source}: no column {' and no column '.join(map(repr, missing))}, which the evaluation "
            f"needs; it has {', '.join(map(repr, rows.column_names))}. Columns must have the names that they have in "
            f"the run's own data"
        )
    if not len(rows):
        raise UserError(f"--data {other.source}: no rows")
    return rows


def chosen_split(names: Sequence[str], other: OtherData) -> str:
    """Return the split to evaluate on: that of --split, the only one, or the one that is held out."""
    if other.split:
        if other.split not in names:
            raise UserError(f"--split {other.split}: --data {other.source} has {', '.join(names)}")
        return other.split
    held_out = next((name for word in HELD_OUT for name in names if name.startswith(word)), None)
    if len(names) > 1 and held_out is None:
        raise UserError(f"--data {other.source}: has {', '.join(names)}; choose one with --split NAME")
    return names[0] if len(names) == 1 else str(held_out)


def numbered(rows: Any, column: str, names: Sequence[str], *, source: str, feature: Any = None) -> Any:
    """Return rows with the classes of a column by their place among the names of a run's.

    Names are texts, or numbers that are the places already. Raises UserError for a class that the run does not know.
    """
    there = rows.features[column]
    values = rows.with_format("arrow", columns=[column])[:][column].to_pylist()
    if hasattr(there, "names"):
        values = [None if value is None else there.names[value] for value in values]
    places = {name: number for number, name in enumerate(names)}
    if all(value is None or isinstance(value, int) for value in values):
        places = {number: number for number in range(len(names))}  # type: ignore[misc]
    _refuse_unknown(values, [*places], column, source)
    digest = xxhash.xxh3_128_hexdigest(repr((rows._fingerprint, column, [*names])).encode())
    numbers = [None if value is None else places[value] for value in values]
    return rows.remove_columns([column]).add_column(column, numbers, feature=feature, new_fingerprint=digest)


def _refuse_unknown(found: Sequence[Any], known: Sequence[Any], column: str, source: str) -> None:
    unknown = list(dict.fromkeys(value for value in found if value is not None and value not in {*known}))
    if unknown:
        raise UserError(
            f"--data {source}: unknown classes in column {column!r}: {some(map(repr, unknown), 5)}; those of the run "
            f"are {some(map(repr, known))}. Leave these rows out"
        )


def _values(rows: Any, column: str) -> list[Any]:
    found: list[Any] = rows.with_format("arrow", columns=[column])[:][column].unique().to_pylist()
    return found


def other_source() -> str:
    """Return what --data of the evaluation says."""
    other = _CURRENT.get()
    assert other is not None
    return other.source

"""Types of the columns of files: decided by what a column is for, and by all of its values, never by the first ones."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shardlaunch.errors import UserError
from shardlaunch.launcher.toolkit.tables import ReadFile

ColumnKind = Literal["text", "label", "number", "any"]
"""`text`; `label`: whole numbers if all are, else text; `number`: float64; `any`: as it stands in the file."""
_WHOLE = r"^(0|-?[1-9]\d{0,17})$"  # as a program writes whole numbers of 64 bits: not 01, +1 or 1.0
_DIGITS = r"^[+-]?\d+$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_TRUTH = r"^(true|false|True|False|TRUE|FALSE)$"


def typed(files: Sequence[ReadFile], columns: Mapping[str, ColumnKind] | None) -> list[Any]:
    """Return the files' tables with columns of the types that their kinds ask for.

    Cells of CSV files are text so far. Without `columns`, those of a name become whole numbers, numbers or truth values
    if all of them are, in all files. Raises UserError, with file and row, for missing values where there is a kind, and
    for what is no number.
    """
    tables = [file.table for file in files]
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        kind = columns.get(name) if columns is not None else None
        if kind is not None and kind != "any":
            for file in files:
                _require_values(file, name)
        cells = [number for number, file in enumerate(files) if _is_of_cells(file, name)]
        values = [tables[number].column(name) for number in cells]
        if not values or kind in ("text", "any"):
            continue
        wanted = _number_type(values, kind)
        for number in cells if wanted is not None else ():
            position = tables[number].column_names.index(name)
            column = _cast(files[number], name, wanted)
            tables[number] = tables[number].set_column(position, name, column)
    return tables


def _is_of_cells(file: ReadFile, name: str) -> bool:
    return file.file.kind in ("csv", "tsv") and name in file.table.column_names


def _require_values(file: ReadFile, name: str) -> None:
    import pyarrow.compute as pc

    if name in file.table.column_names and file.table.column(name).null_count:
        row = int(pc.index(file.table.column(name).is_null(), True).as_py()) + 1
        cell = " (an empty cell)" if file.file.kind in ("csv", "tsv") else ""
        raise UserError(f"--data {file.file.path}: row {row} is without a {name!r}{cell}; complete or remove it")


def _number_type(values: Sequence[Any], kind: ColumnKind | None) -> Any:
    """Return the type that all cells of a column have, None for text."""
    import pyarrow as pa

    if kind == "number":
        return pa.float64()
    if not any(len(column) > column.null_count for column in values):
        return None
    if _all_match(values, _WHOLE):
        return pa.int64()
    if _all_match(values, _NUMBER) and not (kind == "label" and _all_match(values, _DIGITS)):
        return pa.float64()
    return pa.bool_() if kind is None and _all_match(values, _TRUTH) else None


def _all_match(values: Sequence[Any], pattern: str) -> bool:
    import pyarrow.compute as pc

    found = (pc.all(pc.match_substring_regex(column, pattern), skip_nulls=True).as_py() for column in values)
    return all(is_match is not False for is_match in found)


def _cast(file: ReadFile, name: str, wanted: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = file.table.column(name)
    if wanted == pa.float64():
        trimmed = pc.utf8_trim_whitespace(column)
        is_number = pc.match_substring_regex(trimmed, _NUMBER)
        if not pc.all(is_number, skip_nulls=True).as_py():
            row = int(pc.index(is_number, False).as_py())
            raise UserError(
                f"--data {file.file.path}: row {row + 1} has {column[row].as_py()!r} for {name!r}, which is not a "
                f"number"
            )
        column = trimmed
    return column.cast(wanted)

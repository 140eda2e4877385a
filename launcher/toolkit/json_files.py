"""JSON files as tables: an object per line, a list of records, or an object of columns."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shardlaunch.errors import UserError, some

_FORMS = "an object per line, a list of objects, or an object of columns of equal length"
_WORDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def json_table(text: str, *, columns: Sequence[str] | None, is_lines: bool, where: str) -> tuple[Any, dict[str, Any]]:
    """Return a table of the used columns, and `names`: all columns. Strings are text, whatever they look like.

    Raises UserError for other forms, and for a column with values of several types.
    """
    import pyarrow as pa

    records = None if is_lines else _whole(text, where)
    found: dict[str, list[Any]]
    if isinstance(records, Mapping):
        names = list(records)
        found = {name: list(values) for name, values in records.items() if columns is None or name in columns}
    else:
        found, names = _by_column(_lines(text, where) if records is None else records, columns)
    return pa.table({name: _array(values, name, where) for name, values in found.items()}), {"names": names, "how": []}


def _by_column(
    records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None
) -> tuple[dict[str, list[Any]], list[str]]:
    names = list(dict.fromkeys(name for record in records for name in record))
    used = [name for name in names if columns is None or name in columns]
    return {name: [record.get(name) for record in records] for name in used}, names


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a name is given twice: {next(name for name in names if names.count(name) > 1)!r}")
    return record


def _lines(text: str, where: str) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_unrepeated)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: line {number} is not a JSON object ({error}); expected {_FORMS}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: line {number} is {_word(record)}; expected {_FORMS}")
        records.append(record)
    return records


def _whole(text: str, where: str) -> Any:
    """Return the content of a file as records or as columns by name, or None if it is an object per line."""
    try:
        content = json.loads(text, object_pairs_hook=_unrepeated)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from error
    if isinstance(content, list):
        for number, record in enumerate(content, start=1):
            if not isinstance(record, dict):
                raise UserError(f"{where}: entry {number} is {_word(record)}; expected {_FORMS}")
        return content
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds {_word(content)}; expected {_FORMS}")
    if not any(isinstance(values, list | dict) for values in content.values()):
        return [content]  # one record
    columns = list(content.values())
    if all(isinstance(values, dict) and [*values] == [*columns[0]] for values in columns):  # pandas: by index
        return {name: list(values.values()) for name, values in content.items()}
    if all(isinstance(values, list) and len(values) == len(columns[0]) for values in columns):
        if len(columns) == 1 and any(isinstance(value, dict) for value in columns[0]):
            raise UserError(f"{where}: the records are inside {next(iter(content))!r}; expected {_FORMS}")
        return content
    kinds = (f"{name!r} {_word(values)}" for name, values in content.items())
    raise UserError(f"{where}: holds an object of {some(kinds)}; expected {_FORMS}")


def _word(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else _WORDS[type(value)]


def _array(values: list[Any], name: str, where: str) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        kinds = [_WORDS[type(value)] if value is not None else None for value in values]
        first = next((kind for kind in kinds if kind is not None), None)
        for row, kind in enumerate(kinds, start=1):
            if kind not in (None, first):
                raise UserError(
                    f"{where}: {name!r} is {kind} in row {row}, but {first} before; make it one type"
                ) from error
        raise UserError(f"{where}: {name!r} is not readable: {' '.join(str(error).split())[:200]}") from error

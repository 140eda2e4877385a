"""CSV and TSV files as tables of text: nothing is guessed from the cells, and only an empty cell is missing."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardlaunch.errors import UserError, some

BLOCK_BYTES = 1 << 23
MOST_BLOCK_BYTES = (1 << 31) - 1
_QUOTE = ord('"')
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}
_SCANNED_BYTES = 1 << 26


def csv_table(
    content: Any, *, columns: Sequence[str] | None, delimiter: str, is_tsv: bool, where: str
) -> tuple[Any, dict[str, Any]]:
    """Return a table (text, null where a cell is empty) and how it was read: `names` of all columns, and `how`.

    `content` is a buffer of UTF-8 without a byte order mark. The first line has the names. Without a `delimiter`, it
    is the usual one, or the one at which the first line has all `columns`. Quotes are those of RFC 4180; in a TSV file
    that has others, they are text. Raises UserError, with the line, for rows with other numbers of fields than the
    first, and for quotes that are not closed.
    """
    import pyarrow as pa
    import pyarrow.csv

    first = _first_line(content, where)
    if "\0" in first:
        raise UserError(
            f"{where}: holds null bytes; if it is a text in UTF-16, choose --encoding utf-16-le or utf-16-be"
        )
    chosen = delimiter or _delimiter_of(first, columns, is_tsv=is_tsv)
    names = _header(first, chosen)
    used = [name for name in columns if name in names] if columns is not None else names
    repeated = sorted({name for name in used if names.count(name) > 1})
    if repeated:
        raise UserError(f"{where}: several columns are called {some(map(repr, repeated))}; rename them")
    has_quotes = _has_strict_quotes(content, chosen) or _require_quotes(content, chosen, is_tsv=is_tsv, where=where)
    block_bytes = BLOCK_BYTES
    while True:
        try:
            table = pyarrow.csv.read_csv(
                pa.BufferReader(content),
                read_options=pyarrow.csv.ReadOptions(block_size=block_bytes),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=chosen, quote_char='"' if has_quotes else False, newlines_in_values=has_quotes
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=used,
                    column_types=dict.fromkeys(used, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
            break
        except pa.ArrowInvalid as error:
            if "straddling" in str(error) and block_bytes < min(len(content), MOST_BLOCK_BYTES):
                block_bytes = min(len(content) + 1, MOST_BLOCK_BYTES)  # a row that is longer than a block
                continue
            raise _explained(error, content, chosen, len(names), has_quotes=has_quotes, where=where) from error
    _refuse_names_among_rows(table, where)
    how = [] if chosen == ("\t" if is_tsv else ",") else [f"delimiter {_NAMES.get(chosen, chosen)}"]
    how += [] if has_quotes else ["quotes as text"]
    return table, {"names": names, "how": how}


def _refuse_names_among_rows(table: Any, where: str) -> None:
    """Raise UserError for a row that repeats the names of the first line, as files that were joined have."""
    import pyarrow.compute as pc

    repeats = None
    for name in table.column_names:
        is_name = pc.equal(table.column(name), name)
        repeats = is_name if repeats is None else pc.and_(repeats, is_name)
    row = -1 if repeats is None else pc.index(repeats, True).as_py()
    if row >= 0:
        raise UserError(f"{where}: row {row + 1} repeats the names of the first line; remove it")


def _first_line(content: Any, where: str) -> str:
    """Return the first line with text, of which a quoted name may go on in the next."""
    head = bytes(content[: 1 << 20])
    text = head.decode("utf-8", "replace").lstrip("\r\n")
    if not text:
        raise UserError(f"{where}: the file is empty")
    is_quoted = False
    for place, character in enumerate(text):
        is_quoted ^= character == '"'
        if character in "\r\n" and not is_quoted:
            return text[:place]
    return text


def _header(line: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(line, newline=""), delimiter=delimiter), [""])


def _delimiter_of(line: str, columns: Sequence[str] | None, *, is_tsv: bool) -> str:
    usual = ("\t", ",", ";", "|") if is_tsv else (",", ";", "\t", "|")
    headers = {delimiter: _header(line, delimiter) for delimiter in usual}
    whole = [delimiter for delimiter in usual if columns and set(columns) <= set(headers[delimiter])]
    return whole[0] if whole else max(usual, key=lambda delimiter: len(headers[delimiter]))


def _has_strict_quotes(content: Any, delimiter: str) -> bool:
    """Return whether each quote opens a cell, closes it or is doubled within it: then there is one way to read them."""
    data = np.frombuffer(content, dtype=np.uint8)
    places = [
        first + np.flatnonzero(data[first : first + _SCANNED_BYTES] == _QUOTE)
        for first in range(0, len(data), _SCANNED_BYTES)
    ]
    quotes = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    if len(quotes) % 2:
        return False
    opening, closing = quotes[::2], quotes[1::2]
    is_doubled = closing[:-1] + 1 == opening[1:]
    ends = np.zeros(256, dtype=bool)
    ends[[ord(delimiter), ord("\n"), ord("\r")]] = True
    opens = (opening == 0) | ends[data[opening - 1]]
    closes = (closing == len(data) - 1) | ends[data[np.minimum(closing + 1, len(data) - 1)]]
    opens[1:] |= is_doubled
    closes[:-1] |= is_doubled
    return bool(opens.all() and closes.all())


def _require_quotes(content: Any, delimiter: str, *, is_tsv: bool, where: str) -> bool:
    """Return whether quotes enclose cells. Raises UserError for a CSV file with one that is not closed or doubled."""
    rows = _rows(content, delimiter, has_quotes=True)
    try:
        for _ in rows:
            pass
    except csv.Error as error:
        if is_tsv:
            return False
        raise UserError(
            f"{where}: line {rows.line_num}: a quote is not closed, or a quote inside a quoted cell is not doubled "
            f'(""); correct the file'
        ) from error
    return True


def _rows(content: Any, delimiter: str, *, has_quotes: bool) -> Any:
    csv.field_size_limit(MOST_BLOCK_BYTES)
    lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="replace", newline="")
    return csv.reader(
        lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    )


def _explained(
    error: Exception, content: Any, delimiter: str, num_fields: int, *, has_quotes: bool, where: str
) -> UserError:
    """Return the message for a file that cannot be parsed, with the line that is to blame."""
    if "UTF8" in str(error):
        return not_encoded(bytes(content), "utf-8", where)
    if "Empty CSV" in str(error):  # names and no end of line
        return UserError(f"{where}: no rows")
    rows = _rows(content, delimiter, has_quotes=has_quotes)
    before = 0
    for row in rows:
        if row and len(row) != num_fields:
            return UserError(
                f"{where}: line {before + 1} has {len(row)} fields, but the first line has {num_fields} names "
                f"(delimiter {_NAMES.get(delimiter, delimiter)}; a cell with a delimiter inside must be quoted). "
                f"Correct the file, or choose --delimiter"
            )
        before = rows.line_num
    return UserError(f"{where}: not readable: {' '.join(str(error).split())[:300]}")


def not_encoded(content: bytes, encoding: str, where: str) -> UserError:
    """Return the message for bytes that are not in an encoding, with the first line that has such bytes."""
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return UserError(
            f"{where}: line {line} is not in the encoding {encoding} (byte 0x{content[error.start]:02x}); choose with "
            f"--encoding, such as cp1252 or latin-1"
        )
    raise AssertionError("the content is in the encoding")

"""CoNLL files as tables: a word and its tag per line, in the first and the last column, sentences apart by lines."""

import re
from typing import Any

from shardlaunch.errors import UserError

DOCUMENT = "-DOCSTART-"
_BLANKS = re.compile(r"[ \t]+")


def conll_table(text: str, *, where: str) -> tuple[Any, dict[str, Any]]:
    """Return a table of the columns `tokens` and `tags` (lists of text), and `names`: these.

    Columns are apart by tabs, if there are some in the file, else by blanks. Raises UserError for a line without a
    tag, and for lines with different numbers of columns.
    """
    import pyarrow as pa

    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    by_tabs = "\t" in text
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    width = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip(" \t\ufeff"):
            if words[-1]:
                words.append([])
                tags.append([])
            continue
        cells = [cell.strip(" ") for cell in line.split("\t")] if by_tabs else _BLANKS.split(line.strip(" "))
        if cells[0] == DOCUMENT:
            continue
        if len(cells) < 2 or not (cells[0] and cells[-1]):
            raise UserError(f"{where}: line {number} has no word with a tag: {line[:40]!r}")
        width = width or len(cells)
        if len(cells) != width:
            raise UserError(
                f"{where}: line {number} has {len(cells)} columns, but {width} before: {line[:40]!r}. The word is the "
                f"first one and the tag the last one; remove comments"
            )
        words[-1].append(cells[0])
        tags[-1].append(cells[-1])
    if not words[-1]:
        words, tags = words[:-1], tags[:-1]
    kind = pa.list_(pa.string())
    how = [f"{width} columns: the first one and the last one"] if width > 2 else []
    return pa.table({"tokens": pa.array(words, kind), "tags": pa.array(tags, kind)}), {
        "names": ["tokens", "tags"],
        "how": how,
    }

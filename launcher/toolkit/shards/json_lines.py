"""Files of JSON lines, read by ranges of bytes that hold whole lines."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardlaunch.launcher.toolkit.shards.formats import Block, read_bytes, require_columns

BLOCK_BYTES = 1 << 20


class JsonLinesShards:
    """The format of files with one JSON object per line; `columns` are read (None: all that a line has)."""

    kind = "JSON lines"
    version = 1

    def __init__(self, columns: Sequence[str] | None) -> None:
        self._columns = columns

    def blocks(self, path: Path) -> Iterator[Block]:
        """Yield ranges of a mebibyte, up to the end of a line; blank lines are no samples."""
        with open(path, "rb") as file:
            start = 0
            while data := file.read(BLOCK_BYTES):
                data += file.readline()
                num_lines = sum(1 for line in data.split(b"\n") if line.strip())
                if num_lines:
                    yield Block(start, start + len(data), num_lines)
                start += len(data)

    def read(self, path: Path, block: Block) -> "_Lines":
        """Return the lines of a range, which are parsed one by one."""
        data = read_bytes(path, block.start, block.end)
        return _Lines([line for line in data.split(b"\n") if line.strip()], self._columns)


class _Lines:
    def __init__(self, lines: list[bytes], columns: Sequence[str] | None) -> None:
        self._lines = lines
        self._columns = columns

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            found = json.loads(self._lines[row].decode())
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
        if not isinstance(found, dict):
            raise ValueError(f"is no JSON object but {type(found).__name__}")
        require_columns(list(found), self._columns, "field")
        return {name: found[name] for name in self._columns} if self._columns is not None else found

"""Parquet files, read by row groups: their footers say how many rows each has."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardlaunch.launcher.toolkit.shards.formats import Block, require_columns


class ParquetShards:
    """The format of Parquet files with the same columns, of which `columns` are read (None: all)."""

    kind = "parquet"
    version = 1

    def __init__(self, columns: Sequence[str] | None) -> None:
        self._columns = columns
        self._types: tuple[Path, dict[str, str]] | None = None

    def blocks(self, path: Path) -> Iterator[Block]:
        """Yield the row groups of a file, but those without rows."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            self._check_types(path, file.schema_arrow)
            for number in range(file.metadata.num_row_groups):
                num_rows = file.metadata.row_group(number).num_rows
                if num_rows:
                    yield Block(number, number + 1, num_rows)

    def _check_types(self, path: Path, schema: Any) -> None:
        """Raise ValueError for a file that lacks a column, or has other columns than the first one."""
        require_columns(schema.names, self._columns)
        used = schema.names if self._columns is None else self._columns
        types = {name: str(schema.field(name).type) for name in used}
        first, expected = self._types = self._types or (path, types)
        for name in {**expected, **types}:
            here, there = types.get(name, "missing"), expected.get(name, "missing")
            if here != there:
                raise ValueError(f"column {name!r} is {here}, but {there} in {first}; make the files alike")

    def read(self, path: Path, block: Block) -> "_TableRows":
        """Return the rows of a row group, which are kept as Arrow has them."""
        import pyarrow.parquet as pq

        # Without threads of Arrow's own: processes that load are forked from one that has read.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            columns = list(self._columns) if self._columns is not None else None
            return _TableRows(file.read_row_group(block.start, columns=columns, use_threads=False))


class _TableRows:
    """Rows of an Arrow table: numbers as Python has them, lists of numbers as arrays."""

    def __init__(self, table: Any) -> None:
        self._num_rows = table.num_rows
        self._values = {name: _values_of(table.column(name).combine_chunks()) for name in table.column_names}

    def __len__(self) -> int:
        return int(self._num_rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value_of(row) for name, value_of in self._values.items()}


def _values_of(column: Any) -> Callable[[int], Any]:
    """Return a function that returns the value of a row."""
    import pyarrow as pa

    kind = column.type
    if isinstance(column, pa.ChunkedArray):  # text of more than 2 GiB
        return lambda row: column[row].as_py()
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and _is_number(kind.value_type) and not column.null_count and not column.flatten().null_count:
        starts, flat = column.offsets.to_numpy(), column.values.to_numpy()
        return lambda row: flat[starts[row] : starts[row + 1]].copy()
    if pa.types.is_fixed_size_list(kind) and _is_number(kind.value_type) and not column.flatten().null_count:
        whole = column.flatten().to_numpy().reshape(-1, kind.list_size) if not column.null_count else None
        if whole is not None:
            return lambda row: whole[row].copy()
    if _is_number(kind) and not column.null_count:
        numbers: np.ndarray = column.to_numpy()
        return lambda row: numbers[row].item()
    return lambda row: column[row].as_py()


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))

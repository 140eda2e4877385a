"""MDS, the format of MosaicML's streaming library (version 2), read by ranges of samples.

A file holds the number of its samples, the offset of each sample and of the end (all uint32), a JSON object with names,
encodings and sizes of the columns, and the samples: the sizes of the columns that have none in the JSON object
(uint32), then the values.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shardlaunch.launcher.toolkit.shards.formats import Block, read_bytes, require_columns

BLOCK_BYTES = 1 << 22
_WORD = 4
_MOST_CONFIG_BYTES = 1 << 24
_SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_DTYPES = {
    **{8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32"},
    **{64: "uint64", 65: "int64", 66: "float64"},
}


def _number(dtype: str, data: bytes) -> int | float:
    found: int | float = np.frombuffer(data, dtype)[0].item()
    return found


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "jpeg": bytes,
    "png": bytes,
    "str": bytes.decode,
    "int": lambda data: int(np.frombuffer(data, "<i8")[0]),
    "str_int": lambda data: int(data.decode()),
    "str_float": lambda data: float(data.decode()),
    "json": json.loads,
    **{name: partial(_number, name) for name in _SCALARS},
}


class _Column(NamedTuple):
    name: str
    size: int | None
    decode: Callable[[bytes], Any]


class MdsShards:
    """The format of uncompressed MDS files with the same columns, of which `columns` are decoded (None: all)."""

    kind = "MDS"
    version = 1

    def __init__(self, columns: Sequence[str] | None) -> None:
        self._columns = columns
        self._config: tuple[Path, tuple[Any, ...]] | None = None

    def blocks(self, path: Path) -> Iterator[Block]:
        """Yield ranges of samples of about 4 MiB."""
        offsets, config = _header(path)
        names = tuple(config["column_names"])
        require_columns(names, self._columns)
        _columns_of(config)  # raises
        kinds = names, tuple(config["column_encodings"])
        first, expected = self._config = self._config or (path, kinds)
        if kinds != expected:
            raise ValueError(f"has the columns {_shown(kinds)}, and not {_shown(expected)} as {first} has")
        if (np.diff(offsets) < 0).any() or offsets[-1] > path.stat().st_size:
            raise ValueError("is damaged or cut short: its samples lie outside of it")
        cells = (offsets[:-1] - offsets[0]) // BLOCK_BYTES
        starts = np.flatnonzero(np.diff(cells, prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], len(offsets) - 1], strict=True):
            if end > start:
                yield Block(start, end, end - start)

    def read(self, path: Path, block: Block) -> "_Samples":
        """Return the samples of a range, which are decoded one by one."""
        offsets, config = _header(path)
        offsets = offsets[block.start : block.end + 1]
        return _Samples(
            read_bytes(path, int(offsets[0]), int(offsets[-1])),
            offsets - offsets[0],
            _columns_of(config),
            self._columns,
        )


class _Samples:
    def __init__(
        self, data: bytes, offsets: np.ndarray, columns: Sequence[_Column], wanted: Sequence[str] | None
    ) -> None:
        self._data = data
        self._offsets = offsets
        self._columns = columns
        self._wanted = wanted

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        data = self._data[self._offsets[row] : self._offsets[row + 1]]
        num_sizes = sum(column.size is None for column in self._columns)
        sizes = iter(np.frombuffer(data, "<u4", count=num_sizes).tolist())
        found, place = {}, _WORD * num_sizes
        for column in self._columns:
            end = place + (next(sizes) if column.size is None else column.size)
            if self._wanted is None or column.name in self._wanted:
                try:
                    found[column.name] = column.decode(data[place:end])
                except (ValueError, IndexError, KeyError, RecursionError) as error:
                    raise ValueError(f"column {column.name!r} cannot be decoded: {error}") from error
            place = end
        if place != len(data):
            raise ValueError(f"is damaged: its columns have {place:,} bytes, and it {len(data):,}")
        return found


def check_index(path: Path) -> None:
    """Raise ValueError for an index.json that names files which are not there as they should be."""
    for shard in json.loads(path.read_text(encoding="utf-8"))["shards"]:
        name = shard["raw_data"]["basename"]
        if not (path.parent / name).exists():
            is_compressed = shard.get("zip_data") and (path.parent / shard["zip_data"]["basename"]).exists()
            hint = ": it is compressed, decompress it" if is_compressed else ""
            raise ValueError(f"names {name}, which is not there{hint}")


def _header(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the offsets of a file's samples and of their end, and what it says of its columns."""
    (count,) = struct.unpack("<I", read_bytes(path, 0, _WORD))
    end = _WORD * (count + 2)
    offsets = np.frombuffer(read_bytes(path, _WORD, end), "<u4").astype(np.int64)
    if not end <= offsets[0] <= end + _MOST_CONFIG_BYTES:
        raise ValueError("is no MDS file, or damaged")
    config = json.loads(read_bytes(path, end, int(offsets[0])).decode())
    if not isinstance(config, dict) or config.get("format") != "mds" or config.get("version") != 2:
        raise ValueError("is no MDS file of version 2")
    return offsets, config


def _columns_of(config: Mapping[str, Any]) -> list[_Column]:
    names, encodings, sizes = (config[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    return [
        _Column(name, size or None, _decoder(encoding))
        for name, encoding, size in zip(names, encodings, sizes, strict=True)
    ]


def _decoder(encoding: str) -> Callable[[bytes], Any]:
    name, _, settings = encoding.partition(":")
    if name == "ndarray":
        dtype, _, shape = settings.partition(":")
        dims = [int(size) for size in shape.split(",")] if shape else None
        return lambda data: _array(data, dtype, dims)
    if name not in _DECODERS:
        known = ", ".join(("ndarray", *_DECODERS))
        raise ValueError(f"has a column of encoding {encoding!r}, which is not read; known: {known}")
    return _DECODERS[name]


def _array(data: bytes, dtype: str, shape: list[int] | None) -> np.ndarray:
    """Return an array, before whose values stand its dtype and its shape, unless the encoding says them."""
    place = 0
    if not dtype:
        dtype, place = _DTYPES[data[0]], 1
    if shape is None:
        num_dims, width = data[place] >> 2, 1 << data[place] % 4
        place += 1
        shape = np.frombuffer(data, f"<u{width}", count=num_dims, offset=place).tolist()
        place += num_dims * width
    return np.frombuffer(data[place:], dtype).reshape(shape).copy()


def _shown(kinds: tuple[Any, ...]) -> str:
    return ", ".join(f"{name}: {encoding}" for name, encoding in zip(*kinds, strict=True))

"""Tar archives as WebDataset names them: members KEY.NAME that follow one another are the fields of one sample."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardlaunch.launcher.toolkit.shards.formats import Block, read_bytes

BLOCK_BYTES = 1 << 22
KEY = "__key__"


def _array(data: bytes) -> np.ndarray:
    found: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return found


# By the last suffix, as WebDataset's basic decoders have them; all else is left as bytes.
_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("txt", "text", "transcript"), bytes.decode),
    **dict.fromkeys(("cls", "cls2", "class", "count", "index", "inx", "id"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
    "npy": _array,
}


class TarShards:
    """The format of archives whose samples all have the same fields, of which `columns` are read (None: all)."""

    kind = "tar"
    version = 1

    def __init__(self, columns: Sequence[str] | None) -> None:
        self._columns = columns
        self._names: tuple[Path, set[str]] | None = None

    def blocks(self, path: Path) -> Iterator[Block]:
        """Yield ranges of about 4 MiB with whole samples; only the headers of the members are read."""
        block_start, num_samples = 0, 0
        key, start, names = "", 0, set[str]()
        row = -1
        with open(path, "rb") as file:
            for member in _members(file, os.fstat(file.fileno()).st_size):
                member_key, name = _key_and_name(member.name)
                if member_key != key:
                    if row >= 0:
                        self._check_names(path, row, key, names)
                    row += 1
                    if member.offset - block_start >= BLOCK_BYTES and num_samples:
                        yield Block(block_start, member.offset, num_samples)
                        block_start, num_samples = member.offset, 0
                    key, start, names = member_key, member.offset, set()
                    num_samples += 1
                if name in names:
                    raise ValueError(f"sample {row} ({key}) has {name!r} twice")
                names.add(name)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if row >= 0:
            self._check_names(path, row, key, names)
            yield Block(min(block_start, start), end, num_samples)

    def _check_names(self, path: Path, row: int, key: str, names: set[str]) -> None:
        """Raise ValueError if a sample lacks a field, or has others than the first one of the data."""
        if self._columns is not None:
            names &= set(self._columns)
        first, expected = self._names = self._names or (path, set(self._columns or names))
        if names != expected:
            raise ValueError(
                f"sample {row} ({key}) has {', '.join(sorted(names)) or 'none of the fields'}, but those of {first} "
                f"have {', '.join(sorted(expected))}"
            )

    def read(self, path: Path, block: Block) -> "_Samples":
        """Return the samples of a range, which are decoded one by one."""
        data = read_bytes(path, block.start, block.end)
        samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        for member in _members(io.BytesIO(data), len(data), is_part=True):
            key, name = _key_and_name(member.name)
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            if self._columns is None or name in self._columns:
                samples[-1][1][name] = member.offset_data, member.offset_data + member.size
        return _Samples(data, samples)


class _Samples:
    def __init__(self, data: bytes, samples: Sequence[tuple[str, Mapping[str, tuple[int, int]]]]) -> None:
        self._data = data
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        key, fields = self._samples[row]
        return {KEY: key, **{name: self._decoded(name, *place) for name, place in fields.items()}}

    def _decoded(self, name: str, start: int, end: int) -> Any:
        decode = _DECODERS.get(name.rpartition(".")[2].lower(), bytes)
        try:
            return decode(self._data[start:end])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"field {name!r} cannot be decoded: {error}") from error


def _members(file: Any, size: int, *, is_part: bool = False) -> Iterator[tarfile.TarInfo]:
    """Yield the files in an archive, or in a part of one. Raises ValueError where it is damaged or cut short.

    tarfile takes a header that it cannot read, behind the first one, for the end of the archive.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # otherwise it keeps them all
            if member.isfile() and not member.issparse():
                yield member
            elif not member.isdir():
                raise ValueError(f"{member.name} is a link or no plain file, which is not read")
        end = archive.offset
    file.seek(end)
    marker = file.read(tarfile.BLOCKSIZE)
    if is_part and not marker:
        return
    if marker != bytes(tarfile.BLOCKSIZE):
        what = "it is damaged there" if end < size else "it has been cut short: no end is marked"
        raise ValueError(f"cannot be read beyond byte {end:,} of {size:,}; {what}")


def _key_and_name(path: str) -> tuple[str, str]:
    """Return what the members of a sample have in common, and the name of a field: what follows the first dot."""
    folder, _, last = path.rpartition("/")
    key, dot, name = last.partition(".")
    if not dot or not name or not key:
        raise ValueError(f"member {path!r} is not named KEY.NAME, so that it is part of no sample; remove it")
    return f"{folder}/{key}" if folder else key, name

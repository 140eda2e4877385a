"""Write and read single safetensors files as streams: never more than one tensor copied, digests on the fly.

Source of the format: the safetensors README (8-byte little-endian header length, JSON header padded with spaces,
then the tensors' raw bytes; offsets count from the end of the header).
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from shardlaunch.checkpoints.files import naming, retried
from shardlaunch.checkpoints.records import HeaderEntry, decode, open_regular
from shardlaunch.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BYTES_PER_ELEMENT = {dtype: torch.empty((), dtype=dtype).element_size() for dtype in DTYPE_NAMES}

WRITE_BACK_BYTES = 16 << 20  # bytes written before the system is told to start write-back to disk
DIGEST_BYTES = 1 << 20  # read size for digests: small enough to stay in the CPU cache
MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and digest of a file (xxh3-128, hexadecimal)."""

    num_bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Shape, dtype and position of a tensor in a file: offset in bytes from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


class DigestingFile:
    """Write a new file, compute its digest on the fly and fsync it at the end. Raises OSError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by finish() or close()
        self._hash = xxhash.xxh3_128()
        self._num_bytes = 0
        self._num_bytes_started = 0  # bytes whose write-back has been started

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        self._hash.update(data)
        self._num_bytes += len(data)
        with naming(self._path):
            while data:
                data = data[self._file.write(data) :]
        self._begin_write_back()

    def _begin_write_back(self) -> None:
        """Start write-back to disk in the background, instead of leaving all of it to the fsync.

        POSIX_FADV_DONTNEED starts to write dirty pages without waiting; it drops only pages already on disk.
        """
        num_waiting = self._num_bytes - self._num_bytes_started
        if num_waiting >= WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # it is advice
                os.posix_fadvise(self._file.fileno(), self._num_bytes_started, num_waiting, os.POSIX_FADV_DONTNEED)
            self._num_bytes_started = self._num_bytes

    def finish(self) -> FileRecord:
        """Make the file durable and return its record."""
        with naming(self._path):
            os.fsync(self._file.fileno())
            self._file.close()
        return FileRecord(num_bytes=self._num_bytes, digest=self._hash.hexdigest())

    def close(self) -> None:
        """Close without making the file durable, if it is not finished."""
        self._file.close()


class TensorWriter(DigestingFile):
    """Write a new safetensors file: first the header, then the tensors' bytes as they arrive, in the given order."""

    def __init__(self, path: Path, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        super().__init__(path)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key, dtype, shape in entries:
            end = offset + prod(shape) * BYTES_PER_ELEMENT[dtype]
            header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        try:
            self.write(memoryview(len(text).to_bytes(8, "little") + text))
        except OSError:
            self.close()
            raise


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write `data` as a new durable file."""
    file = DigestingFile(path)
    try:
        file.write(memoryview(data))
        return file.finish()
    finally:
        file.close()


def digest_file(path: Path, *, follows_links: bool = False) -> FileRecord:
    """Read a whole regular file, as long as it is at its start, and return its record. Raises UserError."""
    digest = xxhash.xxh3_128()
    num_bytes = 0
    buffer = memoryview(bytearray(DIGEST_BYTES))
    with open_regular(path, follows_links=follows_links) as file, naming(path):
        num_left = os.fstat(file.fileno()).st_size
        while count := file.readinto(buffer[: min(num_left, DIGEST_BYTES)]):
            digest.update(buffer[:count])
            num_bytes += count
            num_left -= count
    return FileRecord(num_bytes=num_bytes, digest=digest.hexdigest())


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensor entries of a safetensors file. Raises UserError for other files.

    The tensors fill the file: each begins where another ends.
    """
    with open_regular(path) as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path}: not a safetensors file")
        data = file.read(header_bytes)
    start = 8 + header_bytes
    entries: dict[str, TensorEntry] = {}
    ranges = []
    for key, value in decode(path, data, dict[str, msgspec.Raw]).items():
        if key == "__metadata__":
            decode(path, bytes(value), dict[str, str])
            continue
        entry = decode(path, bytes(value), HeaderEntry)
        begin, end = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or end - begin != prod(entry.shape) * BYTES_PER_ELEMENT[dtype]:
            raise UserError(f"{path}: tensor {key!r} has an unknown dtype, or a size that does not match its shape")
        entries[key] = TensorEntry(shape=tuple(entry.shape), dtype=dtype, offset=start + begin)
        ranges.append((begin, end))
    position = 0
    for begin, end in sorted(ranges):
        if begin != position:
            break
        position = end
    if position != size - start or any(end > position for _, end in ranges):
        raise UserError(f"{path}: its tensors overlap, leave gaps, or go beyond its end")
    return entries


def read_range(path: Path, entry: TensorEntry, flat_start: int, flat_end: int) -> torch.Tensor:
    """Read only elements [flat_start, flat_end) of a tensor, as a flat tensor on the CPU."""
    return retried(lambda: _read_range(path, entry, flat_start, flat_end))


def _read_range(path: Path, entry: TensorEntry, flat_start: int, flat_end: int) -> torch.Tensor:
    item_bytes = BYTES_PER_ELEMENT[entry.dtype]
    flat = torch.empty(flat_end - flat_start, dtype=entry.dtype)
    view = flat.view(torch.uint8).numpy().data
    with open(path, "rb", buffering=0) as file, naming(path):
        file.seek(entry.offset + flat_start * item_bytes)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{path.name}: ends before its last tensor")
            done += count
    return flat

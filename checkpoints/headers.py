"""The headers of safetensors files. Imports no torch."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec

from shardlaunch.checkpoints.files import naming
from shardlaunch.checkpoints.names import NUM_BYTES
from shardlaunch.checkpoints.records import HeaderEntry, decode, open_regular, regular_size
from shardlaunch.errors import UserError

MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Shape, dtype (its name in the file) and position of a tensor: offset in bytes from the start of the file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int


def header_bytes(path: Path) -> bytes:
    """Return the bytes of a safetensors file before its first tensor. Raises UserError for other files."""
    with open_regular(path) as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        num_bytes = int.from_bytes(length, "little")
        if not 2 <= num_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path}: not a safetensors file")
        return length + file.read(num_bytes)


def read_stored(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name. Raises UserError for other files.

    The tensors fill the file: each begins where another ends.
    """
    data = header_bytes(path)
    start, size = len(data), regular_size(path)
    entries: dict[str, StoredTensor] = {}
    ranges = []
    for key, value in decode(path, data[8:], dict[str, msgspec.Raw]).items():
        if key == "__metadata__":
            decode(path, bytes(value), dict[str, str])
            continue
        entry = decode(path, bytes(value), HeaderEntry)
        begin, end = entry.data_offsets
        if entry.dtype not in NUM_BYTES or end - begin != prod(entry.shape) * NUM_BYTES[entry.dtype]:
            raise UserError(f"{path}: tensor {key!r} has an unknown dtype, or a size that does not match its shape")
        entries[key] = StoredTensor(shape=tuple(entry.shape), dtype=entry.dtype, offset=start + begin)
        ranges.append((begin, end))
    position = 0
    for begin, end in sorted(ranges):
        if begin != position:
            break
        position = end
    if position != size - start or any(end > position for _, end in ranges):
        raise UserError(f"{path}: its tensors overlap, leave gaps, or go beyond its end")
    return entries

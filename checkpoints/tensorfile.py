"""Write and read single safetensors files as streams: never more than one tensor copied, digests on the fly.

Source of the format: the safetensors README (8-byte little-endian header length, JSON header padded with spaces,
then the tensors' raw bytes; offsets count from the end of the header).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.digests import DIGEST_BYTES, DigestingFile, crc64nvme
from shardlaunch.checkpoints.digests import FileRecord as FileRecord
from shardlaunch.checkpoints.digests import digest_file as digest_file
from shardlaunch.checkpoints.digests import write_file as write_file
from shardlaunch.checkpoints.files import naming, retried
from shardlaunch.checkpoints.headers import read_stored

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


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Shape, dtype and position of a tensor in a file: offset in bytes from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


class TensorWriter(DigestingFile):
    """Write a new safetensors file: first the header, then the tensors' bytes as they arrive, in the given order."""

    def __init__(self, path: Path, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        super().__init__(path)
        try:
            self.write(memoryview(header_of(entries)))
        except OSError:
            self.close()
            raise


def header_of(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return what a safetensors file of these tensors, one after the other, begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, dtype, shape in entries:
        end = offset + prod(shape) * BYTES_PER_ELEMENT[dtype]
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path, *, follows_links: bool = False) -> dict[str, TensorEntry]:
    """Return the tensor entries of a safetensors file. Raises UserError for other files.

    The tensors fill the file: each begins where another ends.
    """
    return {
        key: TensorEntry(shape=stored.shape, dtype=DTYPES[stored.dtype], offset=stored.offset)
        for key, stored in read_stored(path, follows_links=follows_links).items()
    }


def read_range(path: Path, entry: TensorEntry, flat_start: int, flat_end: int) -> torch.Tensor:
    """Read only elements [flat_start, flat_end) of a tensor, as a flat tensor on the CPU."""
    flat = torch.empty(flat_end - flat_start, dtype=entry.dtype)
    read_range_into(path, entry, flat_start, flat)
    return flat


def read_range_into(path: Path, entry: TensorEntry, flat_start: int, target: torch.Tensor) -> int:
    """Read elements from `flat_start` on into a contiguous tensor of the CPU, and return their CRC-64/NVME."""
    return retried(lambda: _read_range_into(path, entry, flat_start, target))


def _read_range_into(path: Path, entry: TensorEntry, flat_start: int, target: torch.Tensor) -> int:
    view = target.detach().view(-1).view(torch.uint8).numpy().data
    done = crc = 0
    with open(path, "rb", buffering=0) as file, naming(path):
        file.seek(entry.offset + flat_start * BYTES_PER_ELEMENT[entry.dtype])
        while done < len(view):
            count = file.readinto(view[done : done + DIGEST_BYTES])
            if not count:
                raise ValueError(f"{path.name}: ends before its last tensor")
            crc = crc64nvme(view[done : done + count], crc)
            done += count
    return crc

"""Write files that are durable, with digests on the fly, and digest those that are there. Imports no torch.

CRC-64/NVME is linear: that of a file follows from those of its parts, whoever has written or read them. xxh3-128, which
older checkpoints have, is not.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash
from awscrt import checksums

from shardlaunch.checkpoints.files import naming
from shardlaunch.checkpoints.names import SECTIONS
from shardlaunch.checkpoints.records import DIGESTS, open_regular

CRC64, XXH3 = "crc64nvme", "xxh3_128"
DIGEST_NAMES = dict(zip(SECTIONS, DIGESTS, strict=True))
"""The name in metrics.jsonl of each section's digest."""
WRITE_BACK_BYTES = 16 << 20  # bytes written before the system is told to start write-back to disk
DIGEST_BYTES = 1 << 20  # read size for digests: small enough to stay in the CPU cache


def crc64nvme(data: memoryview | bytes, crc: int = 0) -> int:
    """Return the CRC-64/NVME of data that follows data with the CRC `crc`."""
    return int(checksums.crc64nvme(data, crc))


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and digest of a file: hexadecimal, of a kind that a manifest names."""

    num_bytes: int
    digest: str
    kind: str = CRC64


class Digest(Protocol):
    """A digest that grows with what it is given."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Crc64:
    """CRC-64/NVME of the bytes that it is given."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: memoryview | bytes) -> None:
        """Append bytes."""
        self.value = crc64nvme(data, self.value)

    def hexdigest(self) -> str:
        """Return the digest as 16 digits."""
        return f"{self.value:016x}"


def digest_of_kind(kind: str) -> Digest:
    """Return a new digest."""
    return Crc64() if kind == CRC64 else xxhash.xxh3_128()


def shifted(crc: int, num_bytes: int) -> int:
    """Return what a part with this CRC adds, by xor, to the CRC of a whole in which `num_bytes` follow the part."""
    return int(checksums.combine_crc64nvme(crc, 0, num_bytes))


def joined(parts: Iterable[tuple[int, int]]) -> int:
    """Return the CRC of parts in a row, each given by its CRC and its bytes."""
    whole = 0
    for crc, num_bytes in parts:
        whole = int(checksums.combine_crc64nvme(whole, crc, num_bytes))
    return whole


def digests_of_crcs(tensors: Iterable[tuple[str, str, int, int]]) -> dict[str, str]:
    """Return the digests of weights, optimizer and average, of tensors given by section, key, CRC and bytes.

    By their names in metrics.jsonl; none of a section without tensors. A digest is the CRC-64/NVME, as 16 hexadecimal
    digits, of the bytes of the section's tensors in a row, by their keys.
    """
    sections: dict[str, list[tuple[int, int]]] = {}
    for section, _, crc, num_bytes in sorted(tensors):
        sections.setdefault(section, []).append((crc, num_bytes))
    return {DIGEST_NAMES[section]: f"{joined(parts):016x}" for section, parts in sections.items()}


class DigestingFile:
    """Write a new file, compute its digest on the fly and fsync it at the end. Raises OSError that names the file."""

    def __init__(self, path: Path, *, kind: str = CRC64) -> None:
        self._path = path
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by finish() or close()
        self._kind = kind
        self._digest = digest_of_kind(kind)
        self._num_bytes = 0
        self._num_bytes_started = 0  # bytes whose write-back has been started

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        self._digest.update(data)
        self._num_bytes += len(data)
        with naming(self._path):
            while data:
                data = data[self._file.write(data) :]
        num_waiting = self._num_bytes - self._num_bytes_started
        if num_waiting >= WRITE_BACK_BYTES:
            begin_write_back(self._file.fileno(), self._num_bytes_started, num_waiting)
            self._num_bytes_started = self._num_bytes

    def finish(self) -> FileRecord:
        """Make the file durable and return its record."""
        with naming(self._path):
            os.fsync(self._file.fileno())
            self._file.close()
        return FileRecord(num_bytes=self._num_bytes, digest=self._digest.hexdigest(), kind=self._kind)

    def close(self) -> None:
        """Close without making the file durable, if it is not finished."""
        self._file.close()


def begin_write_back(descriptor: int, start: int, num_bytes: int) -> None:
    """Start write-back of written bytes to disk in the background, instead of leaving all of it to the fsync.

    POSIX_FADV_DONTNEED starts to write dirty pages without waiting; it drops only pages already on disk.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is advice
            os.posix_fadvise(descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write `data` as a new durable file."""
    file = DigestingFile(path)
    try:
        file.write(memoryview(data))
        return file.finish()
    finally:
        file.close()


def digest_file(path: Path, *, kind: str = CRC64, follows_links: bool = False) -> FileRecord:
    """Read a whole regular file, as long as it is at its start, and return its record. Raises UserError."""
    digest = digest_of_kind(kind)
    num_bytes = 0
    buffer = memoryview(bytearray(DIGEST_BYTES))
    with open_regular(path, follows_links=follows_links) as file, naming(path):
        num_left = os.fstat(file.fileno()).st_size
        while count := file.readinto(buffer[: min(num_left, DIGEST_BYTES)]):
            digest.update(buffer[:count])
            num_bytes += count
            num_left -= count
    return FileRecord(num_bytes=num_bytes, digest=digest.hexdigest(), kind=kind)

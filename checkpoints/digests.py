"""Write files that are durable, with digests on the fly, and digest those that are there. Imports no torch."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shardlaunch.checkpoints.files import naming
from shardlaunch.checkpoints.records import open_regular

WRITE_BACK_BYTES = 16 << 20  # bytes written before the system is told to start write-back to disk
DIGEST_BYTES = 1 << 20  # read size for digests: small enough to stay in the CPU cache


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and digest of a file (xxh3-128, hexadecimal)."""

    num_bytes: int
    digest: str


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

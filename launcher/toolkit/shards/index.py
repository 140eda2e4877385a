"""Where the blocks of shards are: found once, and kept in the cache under a digest of the files."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tarfile import TarError
from typing import NamedTuple

import numpy as np
import xxhash

from shardlaunch.checkpoints.files import is_transient, retried
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.toolkit.cache import READ_THREADS, cache_dir, filled
from shardlaunch.launcher.toolkit.files import MOST_FILES
from shardlaunch.launcher.toolkit.shards.formats import Block, ShardFormat, unreadable
from shardlaunch.progress import progress

_END_BYTES = 1 << 16
_PIECES, _PIECE_BYTES = 32, 1 << 12


class Stamp(NamedTuple):
    """What a file is told from its former self by: size and time, and a digest of a part of its bytes."""

    size: int
    mtime_ns: int
    digest: str


@dataclass(frozen=True, eq=False)
class Index:
    """The blocks of some files: file, start, end and number of samples of each (int64 array of four columns).

    Memory: 32 bytes per block, however many samples there are.
    """

    files: Sequence[Path]
    stamps: Sequence[Stamp]
    blocks: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Return the number of samples of each block."""
        return self.blocks[:, 3]

    def block(self, number: int) -> tuple[int, Block]:
        """Return a block, and the number of its file before it."""
        file, *rest = self.blocks[number].tolist()
        return file, Block(*rest)

    def fingerprint(self) -> str:
        """Return a digest of the files, whatever their paths and times."""
        digest = xxhash.xxh3_128(repr([(stamp.size, stamp.digest) for stamp in self.stamps]).encode())
        digest.update(np.ascontiguousarray(self.blocks).data)
        return digest.hexdigest()


def stamp_of(path: Path) -> Stamp:
    """Return a file's stamp: 64 KiB at both ends and 32 pieces of 4 KiB between are read, of a small file all."""
    state = os.stat(path)
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        places = np.linspace(0, state.st_size, _PIECES).astype(np.int64).tolist()
        ends = [(0, _END_BYTES), (max(0, state.st_size - _END_BYTES), _END_BYTES)]
        pieces = [(place, _PIECE_BYTES) for place in places] if state.st_size > 2 * _END_BYTES else []
        for place, length in ends + pieces:
            file.seek(place)
            digest.update(file.read(length))
    return Stamp(state.st_size, state.st_mtime_ns, digest.hexdigest())


def index_of(files: Sequence[Path], form: ShardFormat, columns: Sequence[str] | None) -> Index:
    """Return the index of files, in this order. Raises UserError for what cannot be read, and for files without rows.

    Of several processes one finds the blocks, and the others read them from the cache.
    """
    with ThreadPoolExecutor(READ_THREADS) as threads:
        stamps = list(threads.map(_readable_stamp, files))
    key = (form.kind, form.version, columns, [(stamp.size, stamp.digest) for stamp in stamps])
    name = xxhash.xxh3_128_hexdigest(repr(key).encode())

    def fill(part: Path) -> None:
        found = _found_blocks(files, form)
        with open(part, "wb") as file:
            np.save(file, found, allow_pickle=False)

    path = cache_dir() / "shards" / f"{name}.npy"
    filled(path, fill)
    try:
        blocks = _stored(path)
    except (ValueError, EOFError, OSError):  # cut short by a crash of the machine: made anew, once
        path.unlink()
        blocks = _stored(filled(path, fill))
    if not len(blocks):
        raise UserError(f"--data {some(map(str, files), MOST_FILES)}: no samples")
    empty = set(range(len(files))) - set(blocks[:, 0].tolist())
    if empty:
        current().data.append(f"without samples: {some((files[number].name for number in sorted(empty)), MOST_FILES)}")
    return Index(files=files, stamps=stamps, blocks=blocks)


def _stored(path: Path) -> np.ndarray:
    blocks: np.ndarray = np.load(path, allow_pickle=False)
    if blocks.ndim != 2 or blocks.shape[1] != 4 or blocks.dtype != np.int64:
        raise ValueError(f"{path}: no index")
    return blocks


def _readable_stamp(path: Path) -> Stamp:
    try:
        stamp = retried(partial(stamp_of, path))
    except OSError as error:
        raise unreadable(path, "cannot be read: ", error) from error
    if not stamp.size:
        raise UserError(f"--data {path}: the file is empty, which a shard without samples is not; remove it")
    return stamp


def _numbered_blocks(number: int, path: Path, form: ShardFormat) -> list[tuple[int, int, int, int]]:
    blocks = []
    for block in form.blocks(path):
        progress.advance()
        blocks.append((number, *block))
    return blocks


def _found_blocks(files: Sequence[Path], form: ShardFormat) -> np.ndarray:
    found: list[tuple[int, int, int, int]] = []
    with phase(f"indexing {form.kind} files", num_rows=len(files)) as advance:
        for number, path in enumerate(files):
            with naming(path):
                found += retried(partial(_numbered_blocks, number, path, form))
            advance(1)
    return np.array(found, dtype=np.int64).reshape(-1, 4)


@contextmanager
def naming(path: Path, where: str = "") -> Iterator[None]:
    """Turn what a reader raises into a UserError that names the file, and `where` in it."""
    import pyarrow as pa

    try:
        yield
    except (ValueError, EOFError, LookupError, NotImplementedError, TarError, OSError, pa.ArrowException) as error:
        if isinstance(error, UserError) or is_transient(error):
            raise
        raise unreadable(path, where, error) from error

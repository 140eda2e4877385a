"""The cache of data: one folder, files named by digests of the content they were made from, each filled once."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from shardlaunch.checkpoints.files import is_there, retried
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.progress import progress

if TYPE_CHECKING:
    from filelock import FileLock

READ_BYTES = 1 << 22
READ_THREADS = 8
UNSAID_WAIT_S = 1.0
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_dir() -> Path:
    """Return the folder of the cache, below that of the datasets library (HF_HOME or HF_DATASETS_CACHE)."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "shardlaunch"


def content_digest(paths: Iterable[Path]) -> str:
    """Return a digest of the bytes of files, in this order."""
    digest = xxhash.xxh3_128()
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for one in threads.map(_digest_of_file, paths):
            digest.update(one)
    return digest.hexdigest()


def _digest_of_file(path: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.digest()


@contextmanager
def writing_cache() -> Iterator[None]:
    """Turn an error of the file system into a UserError that names the cache folder."""
    try:
        yield
    except OSError as error:
        problem = refusal(error)
        if problem is None:
            raise
        raise problem from error


def refusal(error: BaseException | None, *, is_of_cache: bool = False) -> UserError | None:
    """Return the message for an error that means that the cache folder is full, or cannot be written or read.

    The error may have been caused, or come while another was handled, by the one of the file system. One that names no
    file is of the cache if it is that of a write, or if `is_of_cache`.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    if error is None or error.errno is None:
        return None
    folder, where = str(cache_dir()), str(error.filename or "")
    is_ours = folder in str(error) or bool(where and folder.startswith(where))
    if where and not is_ours:
        return None
    if error.errno in _FULL:
        return UserError(f"no space left for the cache of data in {folder}: make room, or set HF_HOME")
    reason = os.strerror(error.errno)
    if error.errno in _NOT_WRITABLE:
        return UserError(f"the cache folder {folder} cannot be written ({reason}): set HF_HOME to a folder that can")
    if is_ours or is_of_cache or "writing" in str(error):
        return UserError(f"the cache folder {folder} fails ({reason}): see to its disk, or set HF_HOME")
    return None


def filled(path: Path, fill: Callable[[Path], None]) -> Path:
    """Return a file of the cache; if it is not there, `fill` writes it under another name first.

    Of several processes one fills it, and the others wait. Raises UserError if the folder cannot be written.
    """
    with filling(path):
        if not is_there(path):
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                with writing_cache():
                    fill(part)
                    part.replace(path)
            finally:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
    return path


def _acquire_some_day(lock: "FileLock") -> None:
    """Wait for a lock for as long as another run has it: that one's watchdog ends it if it comes to a stop."""
    from filelock import Timeout

    while not lock.is_locked:
        progress.advance()
        with suppress(Timeout):
            lock.acquire(timeout=UNSAID_WAIT_S)


@contextmanager
def filling(path: Path) -> Iterator[None]:
    """Hold the lock of a file of the cache, unless the file is there. Raises UserError if it cannot be written."""
    with writing_cache():
        is_filled = retried(lambda: is_there(path))
    if is_filled:  # also in a folder that is read-only
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with writing_cache(), suppress(NotImplementedError):  # without locks each fills it, and the last one's stays
        retried(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        try:
            lock.acquire(timeout=UNSAID_WAIT_S)
        except Timeout:
            with phase("waiting for another run that prepares the same data"):
                _acquire_some_day(lock)
    try:
        yield
    finally:
        lock.release()

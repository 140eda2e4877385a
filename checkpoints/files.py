"""Changes of files and folders that survive a crash, and errors of the file system that name the place."""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from shardlaunch.checkpoints.names import TRASH_PREFIX
from shardlaunch.errors import UserError

T = TypeVar("T")
_PASSED_ON = re.compile(r"\[Errno \d+\] (.+): '(.+)'$")

STAGED_SUFFIX = ".staged"
# What a network or a bus causes, and another try may not meet; a full disk is none of them.
TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO})
COME_AGAIN = "See to the disk, or the network that it is on; then the same command resumes"
PAUSES_S = (0.0, 0.1, 0.5)
"""Before each other try."""


def error_text(error: BaseException) -> str:
    """Return an error for a message: of the file system `PATH: reason`.

    One that a data-loading process has passed on is a text whose last line says what it was.
    """
    if isinstance(error, OSError) and error.strerror:
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | Path) else ""
        return f"{path}: {error.strerror}" if path else error.strerror
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copytree: a triple per file
        error = error.args[0][0][-1]
    last = str(error).strip().split("\n")[-1]
    passed_on = _PASSED_ON.search(last)
    return f"{passed_on[2]}: {passed_on[1]}" if passed_on else last or type(error).__name__


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError inside name the path, where the operation works on a descriptor, which it does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def retried(work: Callable[[], T]) -> T:
    """Return the outcome of `work`, which only reads or may be done twice; try again after an error that may pass."""
    for pause_s in PAUSES_S:
        try:
            return work()
        except (OSError, ValueError) as error:
            if not is_transient(error):
                raise
            time.sleep(pause_s)
    return work()


class PassingError(UserError):
    """Raised for an error of the file system that another try, or another start, may not meet."""


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, may not be met again."""
    while error is not None:
        if isinstance(error, PassingError) or (isinstance(error, OSError) and error.errno in TRANSIENT):
            return True
        error = error.__cause__
    return False


def come_again(error: BaseException) -> PassingError:
    """Return an error, for which a start cannot go on, with what to do."""
    return PassingError(f"{error_text(error)}. {COME_AGAIN}")


def is_there(path: Path) -> bool:
    """Return whether a path has an entry, of any kind. Raises OSError where that cannot be found out.

    `os.path.exists` and its kin take every error for a no.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_gone(path: Path) -> bool:
    """Return whether a path surely has no entry: an error does not say so."""
    try:
        return not is_there(path)
    except OSError:
        return False


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, durably."""
    missing = [path]
    while not is_there(missing[-1].parent):
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
    with suppress(OSError):  # a folder above may be one that this user cannot read; then it was there
        for folder in missing:
            fsync(folder.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file durably, as a whole or not at all. Its folder must exist."""
    staged = path.with_name(f".{path.name}{STAGED_SUFFIX}")

    def write() -> None:
        staged.unlink(missing_ok=True)
        with open(staged, "xb", buffering=0) as file, naming(staged):
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        staged.rename(path)
        fsync(path.parent)

    try:
        retried(write)
    except OSError:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise


def discard(folder: Path) -> None:
    """Delete a folder: first, durably, its name, so that no crash leaves half of it under that. Raises OSError."""
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}")
    delete_tree(trash)
    folder.rename(trash)
    fsync(folder.parent)
    delete_tree(trash)


def delete_tree(folder: Path) -> None:
    """Delete a folder as far as possible; it may be gone. Raises the first OSError if something is left."""
    for pause_s in PAUSES_S[:2]:
        errors: list[OSError] = []

        def on_error(function: Any, path: str, found: Any, errors: list[OSError] = errors) -> None:
            error = found[1]
            if not isinstance(error, FileNotFoundError):
                errors.append(OSError(error.errno, error.strerror, path))

        with naming(folder):
            shutil.rmtree(folder, onerror=on_error)
        if not errors:
            return
        time.sleep(pause_s)
    raise errors[0]

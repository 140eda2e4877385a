"""The lock of a run's output folder: the run holds it, and so do those who change its checkpoints from outside.

It is a POSIX record lock: it ends with the process, however that ends, and child processes do not inherit it. Imports
no torch.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardlaunch.errors import UserError

LOCK = ".lock"
HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)


def lock(descriptor: int) -> None:
    """Lock an open file, or raise OSError."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, as the run itself does. Raises UserError where a run is using the folder."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{run_dir / LOCK}: cannot be locked: {error.strerror}") from error
    try:
        try:
            lock(descriptor)
        except OSError as error:
            if error.errno in HELD_BY_ANOTHER:
                raise UserError(f"{run_dir}: a run is using this folder. Wait for it, or stop it") from error
            raise UserError(f"{run_dir / LOCK}: cannot be locked: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)

"""The lock of a run's output folder, for those who change its checkpoints from outside. Imports no torch."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardlaunch.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, as the run itself does. Raises UserError where a run is using the folder."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{run_dir / LOCK}: cannot be locked: {error.strerror}") from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{run_dir}: a run is using this folder. Wait for it, or stop it") from error
        except OSError as error:
            raise UserError(f"{run_dir / LOCK}: cannot be locked: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)

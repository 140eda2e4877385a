"""A file that a run appends to: what cannot be written for a while is kept in memory, and nothing is written twice."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shardlaunch.checkpoints.files import error_text, is_transient, naming
from shardlaunch.errors import UserError

MOST_KEPT = 1 << 20  # bytes in memory while all is well


class Trouble:
    """Something that may fail for a while: said when it begins and when it is over."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.is_on = False

    def begins(self, text: str) -> None:
        """Say that it fails, unless that is known."""
        if not self.is_on:
            self._warn(text)
        self.is_on = True

    def ends(self, text: str) -> None:
        """Say that it works again, if it has failed."""
        if self.is_on:
            self._warn(text)
        self.is_on = False


class LastingFile:
    """Append to a file, whose errors end nothing.

    Bytes are written at their own offset, and kept until they are durable: after an error they are written again, in
    the same place. `prepare` makes the file ready and returns its length; it too is tried again.
    """

    def __init__(self, path: Path, *, prepare: Callable[[], int], warn: Callable[[str], None]) -> None:
        self.path = path
        self._prepare = prepare
        self._trouble = Trouble(warn)
        self._descriptor: int | None = None
        self._durable = 0
        self._kept = bytearray()  # all that follows what is durable
        self._num_written = 0  # of what is kept
        self._lock = threading.Lock()

    def append(self, data: bytes) -> None:
        """Append bytes: at once, or when it works again, which is said once."""
        with self._lock:
            self._kept += data
        if self.attempt() and len(self._kept) > MOST_KEPT:
            with suppress(OSError):
                self.sync()

    def attempt(self) -> bool:
        """Write what is not written, and return whether that worked."""
        try:
            with self._lock:
                self._write()
        except (OSError, UserError) as error:
            if isinstance(error, UserError) and not is_transient(error):
                raise
            self._trouble.begins(
                f"{self.path.name} cannot be written ({error_text(error)}); what follows is kept in memory, and "
                f"written when that works again"
            )
            return False
        self._trouble.ends(f"{self.path.name} is written again, without a gap")
        return True

    def sync(self) -> None:
        """Make durable what was appended. Raises OSError. In any thread, while another one appends."""
        with self._lock:
            self._write()
            assert self._descriptor is not None
            descriptor, num_bytes = self._descriptor, self._num_written
        try:
            with naming(self.path):
                os.fsync(descriptor)
        except OSError:
            with self._lock:
                self._num_written = 0  # the system may have dropped what it could not write
            raise
        with self._lock:
            self._durable += num_bytes
            del self._kept[:num_bytes]
            self._num_written -= num_bytes
        self._trouble.ends(f"{self.path.name} is written again, without a gap")

    def _write(self) -> None:
        if self._descriptor is None:
            self._durable = self._prepare()
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        with naming(self.path):
            while self._num_written < len(self._kept):
                at = self._durable + self._num_written
                self._num_written += os.pwrite(self._descriptor, bytes(self._kept[self._num_written :]), at)

    def close(self) -> None:
        """Close the file; say what is lost, if the last attempt fails too."""
        if self._num_written < len(self._kept) and not self.attempt():
            self._trouble.is_on = False
            self._trouble.begins(f"{self.path}: what was kept in memory could not be written, and is lost")
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

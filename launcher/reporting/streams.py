"""Output that cannot be written, to a full disk, a closed terminal or a pipe whose reader has gone: a run goes on."""

import os
import sys
from contextlib import suppress
from typing import IO, Any

from shardlaunch.checkpoints.files import error_text


class LastingStream:
    """A text stream that says once, on stderr, that it cannot be written, and drops what was to be."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self._is_said = False

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._say(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        if not self._is_said:
            self._is_said = True
            with suppress(OSError):
                print(f"warning: output cannot be written ({error_text(error)}); the run goes on", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_closed_streams() -> None:
    """Open what was closed of stdin, stdout and stderr when this process began, to nowhere.

    Otherwise the next file that is opened gets the descriptor, and what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def survive_closed_output() -> None:
    """Let this process print to stdout and stderr even when nobody reads them any more, or they were closed."""
    open_closed_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream))

"""Output that may lose its reader: a closed terminal, or a pipe whose other end has gone. A run goes on without it."""

import sys
from contextlib import suppress
from typing import Any, TextIO


class LenientStream:
    """A text stream whose errors of writing are dropped, with what was to be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive_closed_output() -> None:
    """Let this process print to stdout and stderr even when nobody reads them any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LenientStream):
            setattr(sys, name, LenientStream(stream))

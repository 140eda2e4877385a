"""The console of a run: output that cannot be written, to a full disk or a closed terminal, does not end the run."""

import sys
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console

from shardlaunch.checkpoints.files import error_text


class LastingConsole(Console):
    """A console that says once, on stderr, that its output cannot be written, and goes on."""

    _lasting: "_LastingStream | None" = None

    @property
    def file(self) -> IO[str]:
        """Return the stream that is written to."""
        stream = Console.file.fget(self)  # type: ignore[attr-defined]
        if self._lasting is None or self._lasting.stream is not stream:
            self._lasting = _LastingStream(stream)
        return cast(IO[str], self._lasting)

    @file.setter
    def file(self, stream: IO[str]) -> None:
        Console.file.fset(self, stream)  # type: ignore[attr-defined]


class _LastingStream:
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

"""The console of a run: output that cannot be written, to a full disk or a closed terminal, does not end the run."""

from typing import IO, cast

from rich.console import Console

from shardlaunch.launcher.reporting.streams import LastingStream


class LastingConsole(Console):
    """A console that says once, on stderr, that its output cannot be written, and goes on."""

    _lasting: "LastingStream | None" = None

    @property
    def file(self) -> IO[str]:
        """Return the stream that is written to."""
        stream = Console.file.fget(self)  # type: ignore[attr-defined]
        if self._lasting is None or self._lasting.stream is not stream:
            self._lasting = LastingStream(stream)
        return cast(IO[str], self._lasting)

    @file.setter
    def file(self, stream: IO[str]) -> None:
        Console.file.fset(self, stream)  # type: ignore[attr-defined]

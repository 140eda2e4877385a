"""Phases of a run besides its steps: what goes on now, shown while it lasts, and how long each one took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from shardlaunch.progress import progress

if TYPE_CHECKING:  # a recipe's --help needs none of it
    from rich.console import Console
    from rich.progress import Progress

PLAIN_LINE_S = 10.0  # between two plain lines of progress
LEAST_S = 1.0  # a phase that took less leaves no line

Advance = Callable[[int], None]
"""Told how many more rows are done."""


class Phases:
    """Phases of a run, shown on a console: in one live line on a terminal, else in a plain line as each begins.

    A phase of a second or more leaves a line with its time, without the time of the phases inside it.
    """

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._live: Progress | None = None
        self._inner_s = [0.0]  # per open phase, innermost last: seconds of the phases inside it
        self.on_begin: Callable[[str], None] | None = None
        """Set while steps are shown: takes the name of a phase, which is shown with them."""

    @contextmanager
    def phase(self, name: str, *, num_rows: int = 0) -> Iterator[Advance]:
        """Show a phase while it lasts. With `num_rows`, the function that is yielded advances a bar."""
        is_live = self._console.is_interactive and not self._console.quiet
        view = self._with_steps if self.on_begin is not None else self._live_line if is_live else self._plain_lines
        begun = time.monotonic()
        self._inner_s.append(0.0)
        try:
            with view(name, num_rows) as advance:
                progress.enter(name)

                def advance_all(num_more: int) -> None:
                    progress.advance()
                    advance(num_more)

                try:
                    yield advance_all
                finally:
                    progress.leave()
        finally:
            elapsed_s = time.monotonic() - begun
            own_s = elapsed_s - self._inner_s.pop()
            self._inner_s[-1] += elapsed_s
        if own_s >= LEAST_S and self.on_begin is None:
            rows = f"{num_rows:,} rows in " if num_rows else ""
            self._print(f"{name}: {rows}{duration_text(own_s)}")

    @contextmanager
    def _with_steps(self, name: str, num_rows: int) -> Iterator[Advance]:
        assert self.on_begin is not None
        self.on_begin(name)
        yield lambda num_more: None

    @contextmanager
    def _live_line(self, name: str, num_rows: int) -> Iterator[Advance]:
        """Show a phase in the live line, in the place of the phase around it."""
        live, outer = self._live, self._live.task_ids[-1:] if self._live is not None else []
        if live is None:
            from shardlaunch.launcher.reporting.live import live_line

            live = self._live = live_line(self._console)
            live.start()
        for task in outer:
            live.update(task, visible=False)
        task = live.add_task(name, total=num_rows or None, count=f"0/{num_rows:,} rows" if num_rows else "")
        num_done = 0

        def advance(num_more: int) -> None:
            nonlocal num_done
            num_done += num_more
            live.update(task, completed=num_done, count=f"{num_done:,}/{num_rows:,} rows")

        try:
            yield advance
        finally:
            live.remove_task(task)
            for task in outer:
                live.update(task, visible=True)
            if not outer:
                live.stop()
                self._live = None

    @contextmanager
    def _plain_lines(self, name: str, num_rows: int) -> Iterator[Advance]:
        self._print(f"{name}{f': {num_rows:,} rows' if num_rows else ''} ...")
        num_done, shown = 0, time.monotonic()

        def advance(num_more: int) -> None:
            nonlocal num_done, shown
            num_done += num_more
            if time.monotonic() - shown >= PLAIN_LINE_S:
                shown = time.monotonic()
                self._print(f"{name}: {num_done:,}/{num_rows:,} rows ...")

        yield advance

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)


_CURRENT: ContextVar[Phases | None] = ContextVar("phases", default=None)


@contextmanager
def shown_by(phases: Phases) -> Iterator[None]:
    """Let `phase` be one of these phases, for code that is not told which run it works for, as a recipe's is."""
    token = _CURRENT.set(phases)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def phase(name: str, *, num_rows: int = 0) -> Iterator[Advance]:
    """Show a phase of the run that is being started here, as `Phases.phase` does; outside of a run, show nothing."""
    phases = _CURRENT.get()
    if phases is None:
        yield lambda num_more: None
    else:
        with phases.phase(name, num_rows=num_rows) as advance:
            yield advance


def duration_text(seconds: float) -> str:
    """Return a duration as text: `12.3 s`, and h:mm:ss from a minute on."""
    return f"{seconds:.1f} s" if seconds < 59.95 else clock_text(seconds)


def clock_text(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

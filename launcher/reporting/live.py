"""The live line of a phase on a terminal."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressBar, SpinnerColumn, Task, TimeElapsedColumn
from rich.text import Text

BAR_WIDTH = 20  # characters


def live_line(console: Console) -> Progress:
    """Return a line with a phase's description, its bar and count where it has rows, and its time."""
    columns = ("{task.description}", _RowsBar(BAR_WIDTH), "{task.fields[count]}", TimeElapsedColumn())
    return Progress(SpinnerColumn(), *columns, console=console, transient=True)


class _RowsBar(BarColumn):
    """A bar for phases that count rows, nothing for the others."""

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
        return super().render(task) if task.total else Text()

"""Console output of a run: a summary at the start, a progress bar or plain lines, a table at the end. Rank 0."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from shardlaunch.launcher.reporting.parameters import ParameterRow

PLAIN_LINE_S = 10.0  # interval between plain progress lines
MAX_MATRIX_SIZE = 20  # rows and columns that fit on a screen
RATE_DECAY = 0.9  # of the moving average of tokens per second


class Display:
    """Print a run's progress on rank 0; silent on the other ranks."""

    def __init__(self, *, silent: bool, on_warning: Callable[[str], None] | None = None) -> None:
        self._on_warning = on_warning
        self.console = Console(quiet=silent, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(escape(text))

    def warn(self, text: str) -> None:
        """Print a warning, or hand it to `on_warning`."""
        if self._on_warning is not None:
            self._on_warning(text)
            return
        self.console.print(f"[yellow]warning:[/yellow] {escape(text)}")

    def summary(self, rows: Mapping[str, str]) -> None:
        """Print aligned names and values."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.console.print(f"[bold]{name:<{width}}[/bold]  {escape(value)}")

    def table(self, title: str, rows: Mapping[str, float]) -> None:
        """Print a table of metrics."""
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in rows.items():
            table.add_row(escape(name), f"{value:.4f}")
        self.console.print(table)

    def columns(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table with names in the first column and values in the others."""
        table = Table()
        for number, title in enumerate(titles):
            table.add_column(escape(title), justify="right" if number else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)

    def parameters(self, rows: Iterable[ParameterRow]) -> None:
        """Print a table of learning rates and weight decay by parameter group."""
        self.columns(
            ("parameters", "tensors", "elements", "lr", "weight decay"),
            [
                (row.names, f"{row.num_tensors:,}", f"{row.num_elements:,}")
                + (("frozen", "") if row.lr is None else (f"{row.lr:g}", f"{row.weight_decay:g}"))
                for row in rows
            ],
        )

    def matrix(self, name: str, values: Sequence[Any]) -> None:
        """Print a metric that is a matrix or a list of numbers; for large ones only where to find them."""
        rows = values if isinstance(values[0], list) else [values]
        if max(len(rows), len(rows[0])) > MAX_MATRIX_SIZE:
            self.say(f"{name}: {len(rows)} x {len(rows[0])} numbers, see metrics.jsonl")
            return
        lines = [[str(number), *(f"{value:g}" for value in row)] for number, row in enumerate(rows)]
        self.columns((name, *map(str, range(len(rows[0])))), lines)

    def progress(self, *, done: int, total: int) -> "ProgressView":
        """Return the progress view of the remaining steps, a context manager."""
        return ProgressView(self.console, done=done, total=total)


class ProgressView:
    """Progress of the training: steps done, loss, learning rate, throughput and time left."""

    def __init__(self, console: Console, *, done: int, total: int) -> None:
        self._console = console
        self._total = total
        self._first = done
        self._rate = 0.0
        self._begun = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=total, completed=done, status="")

    def __enter__(self) -> "ProgressView":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, *, loss: float, lr: float, tokens: int, samples: int, step_s: float) -> None:
        """Show a completed step."""
        if self._console.quiet:
            return
        rate = (tokens or samples) / max(step_s, 1e-9)
        self._rate = rate if not self._rate else RATE_DECAY * self._rate + (1 - RATE_DECAY) * rate
        now = time.monotonic()
        if self._bar is None and not (self._is_due() or step in (self._first + 1, self._total)):
            return
        status = f"loss {loss:.4f}  lr {lr:.2e}  {self._rate:,.0f} {'tokens' if tokens else 'samples'}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self._shown = now
            left_s = (now - self._begun) / max(1, step - self._first) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {status}  {_duration(left_s)} left")

    def evaluating(self, num_done: int, num_samples: int) -> None:
        """Show the progress of an evaluation."""
        status = f"evaluating {num_done:,}/{num_samples:,}"
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        elif self._is_due():
            self._shown = time.monotonic()
            self._console.print(status)

    def _is_due(self) -> bool:
        return time.monotonic() - self._shown >= PLAIN_LINE_S


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

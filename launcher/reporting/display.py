"""Console output of a run: a summary at the start, a progress bar or plain lines, a table at the end. Rank 0."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from shardlaunch.errors import printable
from shardlaunch.launcher.reporting.console import LastingConsole
from shardlaunch.launcher.reporting.parameters import ParameterRow
from shardlaunch.launcher.reporting.phases import LEAST_S, PLAIN_LINE_S, Phases, clock_text, duration_text

MAX_MATRIX_SIZE = 20  # rows and columns that fit on a screen
WIDEST_PLAIN = 160  # characters per line where no terminal sets a limit
LONGEST_ROW_NAME = 24  # characters of a class's name at the left of its row
LONGEST_COLUMN_NAMES = (16, 12, 8, 6)  # the same above its column: the first that fits
SPEED_WINDOW_S = 600.0  # whose steps say how long the others will take
RATE_DECAY = 0.9  # of the moving average of tokens per second


class Display:
    """Print a run's progress on rank 0; silent on the other ranks."""

    def __init__(self, *, silent: bool, on_warning: Callable[[str], None] | None = None) -> None:
        self._on_warning = on_warning
        # In a notebook: plain lines in one stream, as in a file, not a block of HTML for each.
        is_terminal = False if Console().is_jupyter else None  # None: rich finds out
        self.console = LastingConsole(
            quiet=silent, highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=is_terminal
        )
        self.phases = Phases(self.console)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(escape_markup(printable(text)))

    def warn(self, text: str) -> None:
        """Print a warning, or hand it to `on_warning`."""
        if self._on_warning is not None:
            self._on_warning(printable(text))
            return
        self.console.print(f"[yellow]warning:[/yellow] {escape_markup(printable(text))}")

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
            table.add_row(escape(name), number_text(value))
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
            ("parameters", "tensors", "elements", "learning rate", "weight decay"),
            [
                (row.names, f"{row.num_tensors:,}", f"{row.num_elements:,}")
                + (("frozen", "") if row.lr is None else (f"{row.lr:g}", f"{row.weight_decay:g}"))
                for row in rows
            ],
        )

    def matrix(self, name: str, values: Sequence[Any], *, classes: Sequence[str] = (), is_confusion: bool) -> None:
        """Print a metric that is a list of numbers, or of lists of them; of large ones just where they are.

        `classes` names the rows and columns of a confusion matrix, and the numbers of a list that has as many; classes
        without names are numbered.
        """
        shape = _shape(values)
        if len(shape) > 2 or max(shape) > MAX_MATRIX_SIZE or not min(shape):
            self.say(f"{name}: {' x '.join(map(str, shape))} numbers, in metrics.jsonl")
            return
        names = list(classes) if len(classes) == shape[0] else []
        if len(shape) == 1:
            heads = names or list(map(str, range(len(values))))
            self.columns(
                ("class" if names else "", name),
                [(_cut(head, LONGEST_ROW_NAME), number_text(value)) for head, value in zip(heads, values, strict=True)],
            )
            return
        corner = ""
        if is_confusion:
            name, corner = f"{name} (rows: true classes, columns: predicted classes)", "true \\ predicted"
        self._print_matrix(name, values, names if is_confusion else [], corner=corner)

    def _print_matrix(self, title: str, rows: Sequence[Any], names: Sequence[str], *, corner: str) -> None:
        """Print a matrix under the longest names that fit above its columns, else under numbers."""
        numbers = list(map(str, range(max(len(rows), len(rows[0])))))
        row_names = [_cut(name, LONGEST_ROW_NAME) for name in names]
        cuts = [[_cut(name, longest) for name in names] for longest in LONGEST_COLUMN_NAMES]
        headings = [(row_names, cut) for cut in cuts if names and len(set(cut)) == len(names)]
        both = [f"{number} {name}" for number, name in zip(numbers, row_names, strict=False)]
        limit = self.console.width if self.console.is_terminal else max(self.console.width, WIDEST_PLAIN)
        for row_heads, column_heads in (*headings, (both or numbers, numbers)):
            table = Table(title=escape(title), title_justify="left", title_style="bold")
            table.add_column(escape(corner))
            for head in column_heads[: len(rows[0])]:
                table.add_column(escape(head), justify="right")
            for head, row in zip(row_heads, rows, strict=False):
                table.add_row(escape(head), *map(number_text, row))
            width = self.console.measure(table, options=self.console.options.update(width=1000)).maximum
            if width <= limit:
                self.console.print(table, width=width)
                return
        self.say(f"{title}: {len(rows)} x {len(rows[0])} numbers, in metrics.jsonl")

    def progress(self, *, done: int, total: int) -> "ProgressView":
        """Return the view of the steps to come, a context manager."""
        return ProgressView(self.console, self.phases, done=done, total=total)


class ProgressView:
    """Progress of the training: steps done, loss, learning rate, throughput and time left."""

    def __init__(self, console: Console, phases: Phases, *, done: int, total: int) -> None:
        self._console = console
        self._phases = phases
        self._total = total
        self._first = self._step = done
        self._rate = 0.0
        self._steps_s = 0.0
        self._num_counted = 0
        self._unit = "samples"
        self._begun = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if console.is_interactive and not console.quiet:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[status]}"),
                _TimeLeft(table_column=Column(no_wrap=True)),
                console=console,
                refresh_per_second=4,
                speed_estimate_period=SPEED_WINDOW_S,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, completed=done, status="first step", is_training=False)

    def __enter__(self) -> "ProgressView":
        if self._bar is not None:
            self._bar.start()
            self._phases.on_begin = self._show_status
        else:
            self._console.print("first step ...")
            self._phases.on_begin = lambda name: None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phases.on_begin = None
        if self._bar is not None:
            self._bar.stop()
        num_steps = self._step - self._first
        if kind is None and num_steps:
            rate = self._num_counted / max(self._steps_s, 1e-9)
            took = duration_text(time.monotonic() - self._begun)
            speed = f"{rate:,.0f} {self._unit}/s"
            self._console.print(f"trained {num_steps:,} steps in {took}; {speed} without evaluations and saves")

    def step(self, step: int, *, loss: float, lr: float, tokens: int, samples: int, step_s: float) -> None:
        """Show a completed step."""
        if self._console.quiet:
            return
        num_counted = tokens or samples
        self._step = step
        self._num_counted += num_counted
        self._steps_s += step_s
        rate = num_counted / max(step_s, 1e-9)
        self._rate = rate if not self._rate else RATE_DECAY * self._rate + (1 - RATE_DECAY) * rate
        now = time.monotonic()
        if self._bar is None and not (self._is_due() or step in (self._first + 1, self._total)):
            return
        self._unit = "tokens" if tokens else "samples"
        status = f"loss {loss:.4f}  lr {lr:.2e}  {self._rate:,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status, is_training=True)
        else:
            self._shown = now
            left_s = (now - self._begun) / max(1, step - self._first) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {status}  {clock_text(left_s)} left")
        if step == self._first + 1 and step_s >= LEAST_S:
            self._console.print(f"first step: {duration_text(step_s)}")

    def evaluating(self, num_done: int, num_samples: int) -> None:
        """Show how far an evaluation is."""
        status = f"evaluating {num_done:,}/{num_samples:,} samples"
        if self._bar is not None:
            self._show_status(status)
        elif self._is_due():
            self._shown = time.monotonic()
            self._console.print(status)

    def _show_status(self, status: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, status=status, is_training=False)

    def _is_due(self) -> bool:
        return time.monotonic() - self._shown >= PLAIN_LINE_S


class _TimeLeft(TimeRemainingColumn):
    """The time left for the steps, while steps are what goes on."""

    def render(self, task: Task) -> Text:
        return super().render(task) + Text(" left") if task.fields["is_training"] else Text()


def number_text(value: float) -> str:
    """Return a metric as text; one that is not defined for the data, which is NaN, says so."""
    if isinstance(value, int):
        return f"{value:,}"
    return "undefined" if math.isnan(value) else f"{value:.4f}"


def _shape(values: Any) -> tuple[int, ...]:
    """Return the lengths of lists within lists, which are those of a tensor."""
    return (len(values), *(_shape(values[0]) if values else ())) if isinstance(values, list) else ()


def _cut(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def escape(name: str) -> str:
    """Return a name on one line, without control characters, that rich does not take for markup."""
    return escape_markup(printable(name, is_name=True))

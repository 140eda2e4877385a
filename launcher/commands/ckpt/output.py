"""What the commands on checkpoints print: tables and sizes for readers, one JSON document for programs."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from shardlaunch.checkpoints.records import to_json
from shardlaunch.errors import printable


def print_json(document: Any) -> None:
    """Print a document as JSON; NaN and infinities as text, as in the files of a run."""
    print(to_json(document, indent=1).decode())


def warn(message: str) -> None:
    """Print a warning on stderr, which keeps stdout for the result."""
    print(f"warning: {printable(message)}", file=sys.stderr)


def print_table(rows: Sequence[Sequence[str]], *, indent: str = "", right: Iterable[int] = ()) -> None:
    """Print rows, the first of which is the heading, in columns; those in `right` end at the right."""
    rows = [[printable(cell, is_name=True) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    ends = set(right)
    for row in rows:
        cells = [
            cell.rjust(width) if column in ends else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print((indent + "  ".join(cells)).rstrip())


def size(num_bytes: int) -> str:
    """Return a size as text, such as `271.6 MB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes} B"


def age(saved_at_s: float) -> str:
    """Return how long ago a time was, such as `3 h`."""
    age_s = max(0.0, time.time() - saved_at_s)
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= seconds:
            return f"{age_s / seconds:.0f} {unit}"
    return f"{age_s:.0f} s"


def number(value: Any) -> str:
    """Return a metric as text."""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
    return str(value)

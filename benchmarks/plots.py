"""Log-log plots of benchmarks/results/*.json as SVG files in docs/plots, which tables.py writes and checks."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from record import RESULTS

PLOTS = RESULTS.parents[1] / "docs" / "plots"
WIDTH, HEIGHT = 300, 220  # of a panel, within its axes
LEFT, TOP, BOTTOM, GAP, KEY = 60, 40, 50, 70, 20
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines by name over the number of ranks."""

    title: str
    lines: Mapping[str, Points]


def all_plots() -> dict[Path, str]:
    """Return the plots of the results that are there, by their files."""
    found = {}
    for name, panels_of in {"scale": _scale, "startup_ranks": _startup}.items():
        result = RESULTS / f"{name}.json"
        if result.exists():
            found[PLOTS / f"{name}.svg"] = svg(panels_of(json.loads(result.read_text())["rows"]))
    return found


def _scale(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    measures: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "plan, s of CPU per rank": lambda row: float(row["plan_s"]),
        "memory of the plan, MB per rank": lambda row: row["memory_bytes"] / 1e6,
        "largest share, MB": lambda row: row["largest_share_bytes"] / 1e6,
    }
    return [_panel(title, rows, lambda row: f"{row['model']}, {row['layout']}", of) for title, of in measures.items()]


def _startup(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    measures = {"open descriptors per rank": "descriptors", "start and end, s of CPU per rank": "cpu_s"}
    return [
        _panel(title, rows, lambda row: f"{row['strategy']}, {row['arm']}", lambda row, key=key: float(row[key]))
        for title, key in measures.items()
    ]


def _panel(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    name: Callable[[Mapping[str, Any]], str],
    of: Callable[[Mapping[str, Any]], float],
) -> Panel:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(name(row), []).append((row["ranks"], of(row)))
    return Panel(title=title, lines=lines)


def svg(panels: Sequence[Panel]) -> str:
    """Return panels beside each other, with one key below, since all have the same lines."""
    names = list(panels[0].lines)
    width = LEFT + len(panels) * (WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM + KEY * len(names) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _drawn(panel, left=LEFT + number * (WIDTH + GAP))
    for number, name in enumerate(names):
        y = TOP + HEIGHT + BOTTOM + KEY * number
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + 24}" y2="{y}" {_style(number)}/>')
        parts.append(f'<text x="{LEFT + 32}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _drawn(panel: Panel, *, left: int) -> list[str]:
    """Return a panel whose axes span the powers around its points: of 2 for ranks, of 10 for the others."""
    points = [point for line in panel.lines.values() for point in line]
    xs = _powers([x for x, _ in points], 2)
    ys = _powers([y for _, y in points], 10)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        up = math.log(y / ys[0]) / math.log(ys[-1] / ys[0])
        return round(left + across * WIDTH, 1), round(TOP + (1 - up) * HEIGHT, 1)

    parts = [f'<text x="{left}" y="{TOP - 16}" font-weight="bold">{escape(panel.title)}</text>']
    for number, x in enumerate(xs):
        at, bottom = place(x, ys[0])
        parts.append(f'<line x1="{at}" y1="{TOP}" x2="{at}" y2="{bottom}" stroke="#ddd"/>')
        if number % -(-len(xs) // 5) == 0:
            parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{x:,.0f}</text>')
    for y in ys:
        _, at = place(xs[0], y)
        parts.append(f'<line x1="{left}" y1="{at}" x2="{left + WIDTH}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4}" text-anchor="end">{y:,g}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 32}" text-anchor="middle">ranks</text>')
    for number, line in enumerate(panel.lines.values()):
        for one, other in pairwise([place(*point) for point in line]):
            parts.append(f'<line x1="{one[0]}" y1="{one[1]}" x2="{other[0]}" y2="{other[1]}" {_style(number)}/>')
    return parts


def _powers(values: Sequence[float], base: int) -> list[float]:
    """Return the powers of a base from the one below the least value to the one above the largest."""
    first = math.floor(math.log(min(values), base) + 1e-9)
    last = max(first + 1, math.ceil(math.log(max(values), base) - 1e-9))
    return [float(base) ** exponent for exponent in range(first, last + 1)]


def _style(number: int) -> str:
    dashes = ' stroke-dasharray="5 3"' if number % 2 else ""  # where lines lie upon each other
    return f'stroke="{COLORS[number % len(COLORS)]}" stroke-width="2"{dashes}'

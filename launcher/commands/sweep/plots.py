"""Plots of points and lines as SVG, and their page, in the look of a report."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from shardlaunch.launcher.commands.report.charts import Axis, short
from shardlaunch.launcher.commands.report.look import STYLE
from shardlaunch.launcher.commands.report.page import POLICY

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 36
_LOG_FROM = 30  # ratio of the largest to the smallest value from which the vertical axis is logarithmic

_OWN_STYLE = """
.share{display:inline-block;height:10px;border-radius:2px;background:var(--c0);margin-right:8px;vertical-align:middle}
.legend i{display:inline-block;width:9px;height:9px;border-radius:50%;margin:0 5px 0 14px;background:var(--c)}
.legend span:first-child i{margin-left:0}
.legend i.hollow{background:var(--bg);border:1.5px solid var(--c)}
"""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A dot of a plot."""

    x: float
    y: float
    kind: str
    """Classes of the style sheet."""
    about: str
    """Shown beside the pointer."""


def axis_of(which: str) -> tuple[float, float]:
    """Return the pixels between which an axis, x or y, lies."""
    return (_LEFT, WIDTH - _RIGHT) if which == "x" else (HEIGHT - _BOTTOM, _TOP)


def figure(
    title: str,
    about: str,
    points: Sequence[Point],
    *,
    x_axis: Axis,
    x_ticks: Sequence[tuple[float, str]],
    x_name: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
) -> str:
    """Return a figure of points, and of lines, each with its classes; empty where there is nothing to draw."""
    values = [point.y for point in points] + [y for _, line in lines for _, y in line]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > _LOG_FROM
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bounds = (low / 1.1, high * 1.1) if is_log else (low - room, high + room)
    y_axis = Axis(*bounds, *axis_of("y"), is_log=is_log)
    base, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value in y_axis.ticks(4):
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value, text in x_ticks:
        x = x_axis.at(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 15}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="unit" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    parts += [polyline(kind, line, x_axis, y_axis) for kind, line in lines]
    parts += [
        f'<circle class="dot {one.kind}" cx="{x_axis.at(one.x):.1f}" cy="{y_axis.at(one.y):.1f}" r="4">'
        f"<title>{escape(one.about)}</title></circle>"
        for one in points
        if math.isfinite(one.y)
    ]
    notes = ", ".join(filter(None, [about, "log scale" * (is_log and "log scale" not in about)]))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {escape(notes)}</figcaption><div class="plot">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"</div></figure>"
    )


def polyline(kind: str, line: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    """Return a line as an element."""
    path = "L".join(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}" for x, y in line if math.isfinite(y))
    return f'<path class="l {kind}" d="M{path}"/>'


def document(title: str, about: str, body: str) -> str:
    """Return a page with a title and HTML as its body, which needs nothing besides."""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="generator" content="shardlaunch">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}{_OWN_STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(about)}, made {made}</p></header>{body}'
        f"</main></body></html>"
    )

"""Line charts as SVG: thinned, with units on the axes and a letter at the end of each line."""

import json
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from shardlaunch.launcher.commands.report.reading import Series

MOST_POINTS = 600
"""Per line: more are thinned to the lowest, the highest and the mean of as many groups."""
WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 62, 12, 34
_LEAST_GAP = 13  # between labels
_FEW = 40  # points of a line that is neither smoothed nor without dots
_LOG_FROM = 30  # ratio of the largest to the smallest value from which the axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart."""

    letter: str
    """Of its run."""
    color: int
    series: Series
    is_average: bool = False
    """Of the average of its run's weights: it is dashed, and its letter has a stroke."""
    has_dots: bool = False

    @property
    def mark(self) -> str:
        return "′" * self.is_average  # noqa: RUF001 - a prime


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """Points to draw: means of groups, and their lowest and highest values where a group has several."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]
    is_thinned: bool

    @property
    def has_range(self) -> bool:
        return self.is_thinned and self.lows != self.highs


def thinned(series: Series, most: int = MOST_POINTS) -> Thinned:
    """Return at most so many points of a series, without those that are not finite."""
    steps, values = np.frombuffer(series.steps), np.frombuffer(series.values)
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    if len(values) <= most:
        points = values.tolist()
        return Thinned(steps=steps.tolist(), means=points, lows=points, highs=points, is_thinned=False)
    firsts = np.arange(most) * len(values) // most
    sizes = np.diff(firsts, append=len(values))
    return Thinned(
        steps=steps[firsts + sizes // 2].tolist(),
        means=(np.add.reduceat(values, firsts) / sizes).tolist(),
        lows=np.minimum.reduceat(values, firsts).tolist(),
        highs=np.maximum.reduceat(values, firsts).tolist(),
        is_thinned=True,
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the means over the nearest values, a twentieth of them all."""
    reach = max(1, len(values) // 40)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, number - reach), min(len(values), number + reach + 1)) for number in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in bounds]


def chart(title: str, unit: str, lines: Sequence[Line], *, is_noisy: bool = False) -> str:
    """Return a figure of some lines by step. `is_noisy` ones are drawn faint, with their running mean."""
    drawn = [(line, points) for line in lines if (points := thinned(line.series)).steps]
    if not drawn:
        return ""
    lowest, highest = min(min(points.lows) for _, points in drawn), max(max(points.highs) for _, points in drawn)
    is_log = lowest > 0 and highest / lowest > _LOG_FROM
    first_step, last_step = min(p.steps[0] for _, p in drawn), max(p.steps[-1] for _, p in drawn)
    x_axis = Axis(0 if first_step <= last_step / 10 else first_step, last_step, _LEFT, WIDTH - _RIGHT)
    y_axis = Axis(*_padded(lowest, highest, is_log=is_log), HEIGHT - _BOTTOM, _TOP, is_log=is_log)
    parts = [_axes(x_axis, y_axis)]
    ends: list[tuple[float, str, int]] = []
    data = []
    for line, points in drawn:
        is_smoothed = is_noisy and len(points.steps) > _FEW
        means = smoothed(points.means) if is_smoothed else points.means
        parts += _line(line, points, means, x_axis, y_axis, is_smoothed=is_smoothed)
        ends.append((y_axis.at(means[-1]), f"{line.letter}{line.mark} {short(means[-1])}", line.color))
        data.append(
            {
                "run": f"{line.letter}{line.mark}",
                "c": line.color,
                "x": [round(step, 2) for step in points.steps],
                "y": [float(f"{value:.5g}") for value in means],
            }
        )
    parts += _labels(ends)
    notes = [unit] * bool(unit) + ["log scale"] * is_log
    notes += ["running mean, each step faint"] * (is_noisy and any(len(points.steps) > _FEW for _, points in drawn))
    notes += ["thinned, with the range of each group of steps"] * any(points.has_range for _, points in drawn)
    caption = f"<figcaption><b>{escape(title)}</b> {escape(', '.join(notes))}</figcaption>"
    found = json.dumps({"from": x_axis.low, "to": x_axis.high, "lines": data}, separators=(",", ":"))
    return (
        f'<figure class="chart">{caption}<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)} by step">{"".join(parts)}'
        f'<line class="cursor" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/></svg><div class="tip"></div></div>'
        f'<script type="application/json">{found}</script></figure>'
    )


def _line(
    line: Line, points: Thinned, means: Sequence[float], x_axis: "Axis", y_axis: "Axis", *, is_smoothed: bool
) -> list[str]:
    """Return a line's elements: the range of its groups, each step, the line itself, its points."""
    xs, ys = list(map(x_axis.at, points.steps)), list(map(y_axis.at, means))
    color, parts = f"c{line.color}", []
    if points.has_range:
        outline = [*zip(xs, map(y_axis.at, points.highs), strict=True)]
        outline += reversed([*zip(xs, map(y_axis.at, points.lows), strict=True)])
        parts.append(f'<path class="band {color}" d="{_path(outline)}Z"/>')
    elif is_smoothed:
        each = zip(xs, map(y_axis.at, points.means), strict=True)
        parts.append(f'<path class="l faint {color}" d="{_path(each)}"/>')
    parts.append(f'<path class="l {color}{" dash" * line.is_average}" d="{_path(zip(xs, ys, strict=True))}"/>')
    if (line.has_dots and len(xs) <= _FEW) or len(xs) == 1:
        shape = f"dot {color}{' hollow' * line.is_average}"
        parts += [f'<circle class="{shape}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in zip(xs, ys, strict=True)]
    return parts


class Axis:
    """A range of values, and the pixels that it is drawn to."""

    def __init__(self, low: float, high: float, begin: float, end: float, *, is_log: bool = False) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self._begin, self._end, self.is_log = begin, end, is_log

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return self._begin + (value - low) / (high - low) * (self._end - self._begin)

    def ticks(self, count: int) -> list[float]:
        """Return about so many round values."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0, 3.0) if last - first <= 3 else (1.0,)
            stride = max(1, (last - first) // count)
            values = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
            return [value for value in values if self.low <= value <= self.high]
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, int(self.high / step + 1e-9) + 1)]


def _padded(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    if is_log:
        return low / 1.08, high * 1.08
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < (high - low) * 0.25 else low - room), high + room


def _axes(x_axis: Axis, y_axis: Axis) -> str:
    left, right, base = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in y_axis.ticks(4):
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in filter(float.is_integer, map(float, x_axis.ticks(4))):
        x = x_axis.at(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 15}" text-anchor="middle">{counted(value)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="unit" x="{right}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    return "".join(parts)


def _labels(ends: list[tuple[float, str, int]]) -> list[str]:
    """Return the labels at the ends of lines, moved apart where they would overlap."""
    placed: list[list[float]] = []
    order = sorted(range(len(ends)), key=lambda number: ends[number][0])
    for number in order:
        y = max(ends[number][0], placed[-1][0] + _LEAST_GAP if placed else _TOP)
        placed.append([y, number])
    limit: float = HEIGHT - _BOTTOM
    for one in reversed(placed):
        one[0] = min(one[0], limit)
        limit = one[0] - _LEAST_GAP
    x = WIDTH - _RIGHT + 6
    return [
        f'<text class="end t{color}" x="{x}" y="{y + 4:.1f}">{escape(text)}</text>'
        for y, (_, text, color) in ((y, ends[int(number)]) for y, number in placed)
    ]


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def short(value: float) -> str:
    """Return a number in few characters."""
    if value == 0:
        return "0"
    size = abs(value)
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return f"{value / min(factor, 1e3 if letter == 'k' else factor):.3g}{letter}"
    if size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def counted(value: float) -> str:
    """Return a step in few characters."""
    return f"{value:.0f}" if value < 10_000 else short(value)


def scaled(series: Series, factor: float) -> Series:
    """Return a series in another unit."""
    return Series(steps=series.steps, values=array("d", (value * factor for value in series.values)))

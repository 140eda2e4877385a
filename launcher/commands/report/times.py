"""The section of a report on what steps took, where their time went, and memory."""

import math
import statistics
from collections.abc import Sequence
from html import escape

from shardlaunch.launcher.commands.report.charts import Line, chart, scaled
from shardlaunch.launcher.commands.report.look import NUM_COLORS, PART_COLORS
from shardlaunch.launcher.commands.report.parts import grid, key, letter, named, seconds, table
from shardlaunch.launcher.commands.report.reading import RunFacts, Series
from shardlaunch.progress import PARTS, WAITING

_LEAST_TIMES = 20
_SLOWER = 1.5  # than the median rank, by which a slow one is named
_LEAST_SHARE = 0.2  # of the step, that this costs

_HEADS = ("run", "median step", "95 % below", "longest", "throughput", "most memory", "where a step's time went")


def times(runs: Sequence[RunFacts]) -> str:
    """Return what steps took and where, and the memory."""
    rows = [_row(number, run) for number, run in enumerate(runs) if any(_step_times(run))]
    if not rows:
        return ""
    parts = [table(_HEADS, rows, numbers=(1, 2, 3, 4, 5))]
    if any(run.parts for run in runs):
        legend = "".join(
            f'<span><i style="background:var(--c{color})"></i>{part}</span>'
            for part, color in zip(PARTS, PART_COLORS, strict=True)
        )
        parts.append(f'<p class="soft parts">Median over the ranks, in the last report of the run:{legend}</p>')
    slow = [f"<li>{key(number)}{text}</li>" for number, run in enumerate(runs) for text in _slow_parts(run)]
    if slow:
        parts.append(f"<ul>{''.join(slow)}</ul>")
    step_times = _lines(runs, [run.series.get("step_s", Series()) for run in runs], 1000)
    memories = _lines(runs, [run.memory for run in runs], 1e-9)
    parts.append(
        grid(
            [
                chart("step time", "ms per step", step_times, is_noisy=True),
                chart("memory of the first rank", "GB, the most so far", memories),
            ]
        )
    )
    return "".join(parts)


def _lines(runs: Sequence[RunFacts], series: Sequence[Series], factor: float) -> list[Line]:
    return [
        Line(letter=letter(number), color=number % NUM_COLORS, series=scaled(one, factor))
        for number, one in enumerate(series)
    ]


def _step_times(run: RunFacts) -> list[float]:
    return [value for value in run.series.get("step_s", Series()).values if math.isfinite(value)]


def _row(number: int, run: RunFacts) -> list[str]:
    step_s = _step_times(run)
    unit = "tokens" if "tokens" in run.series else "samples"
    counted = sum(run.series.get(unit, Series()).values)
    memory = max(run.memory.values, default=0.0)
    return [
        named(number, run.name),
        seconds(statistics.median(step_s)),
        seconds(statistics.quantiles(step_s, n=20)[-1]) if len(step_s) >= _LEAST_TIMES else "",
        seconds(max(step_s)),
        f"{counted / max(sum(step_s), 1e-9):,.0f} {unit}/s" if counted else "",
        f"{memory / 1e9:.2f} GB" if memory else "not recorded",
        _bar(run),
    ]


def _bar(run: RunFacts) -> str:
    last = {part: run.parts[part].values[-1] for part in PARTS if part in run.parts}
    total = sum(last.values())
    if not total:
        return '<span class="soft">recorded on several ranks, every 100 steps</span>'
    pieces = "".join(
        f'<div class="p{number}" style="width:{100 * last.get(part, 0) / total:.1f}%"></div>'
        for number, part in enumerate(PARTS)
    )
    words = ", ".join(f"{part} {100 * value / total:.0f} %" for part, value in last.items())
    return f'<div class="bar" role="img" aria-label="{words}">{pieces}</div><span class="soft">{words}</span>'


def _slow_parts(run: RunFacts) -> list[str]:
    """Say where the slowest rank was clearly slower than the median one, in the last report."""
    total = sum(series.values[-1] for series in run.parts.values()) or 1.0
    found = []
    for part, series in run.parts.items():
        median, slowest = series.values[-1], run.slowest[part].values[-1]
        if part != WAITING and slowest > _SLOWER * median and slowest - median > _LEAST_SHARE * total:
            found.append(
                f"the slowest rank took {seconds(slowest)} per step for {escape(part)}, the median one "
                f"{seconds(median)}"
            )
    return found

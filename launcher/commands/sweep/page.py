"""The page of a sweep: objective by trial and by each option, curves of the evaluations, importances, all trials."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from shardlaunch.checkpoints.files import error_text, replace_file
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.report.charts import Axis, short
from shardlaunch.launcher.commands.report.parts import duration, grid, table
from shardlaunch.launcher.commands.sweep.plots import Point, axis_of, document, figure
from shardlaunch.launcher.commands.sweep.record import SweepRecord, TrialResult, best_of

PAGE = "sweep.html"
COMPLETE, PRUNED, RUNNING, BEST = "c0", "c6 hollow", "c5 hollow", "c1"
_DOTS = {"complete": COMPLETE, "pruned": PRUNED, "running": RUNNING}
_MOST_CURVES = 60


def write_page(
    folder: Path,
    record: SweepRecord,
    results: Sequence[TrialResult],
    importances: Mapping[str, float],
    command: str,
) -> Path:
    """Write the page of a sweep in its folder, and return where. `results` are in order, the best first.

    Raises UserError where it cannot be written.
    """
    path = folder / PAGE
    try:
        replace_file(path, page(folder.name, record, results, importances, command).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error_text(error)}") from error
    return path


def page(
    name: str, record: SweepRecord, results: Sequence[TrialResult], importances: Mapping[str, float], command: str
) -> str:
    """Return one HTML document, which needs nothing besides."""
    best = best_of(results, is_min=record.is_min)
    shown = [one for one in results if one.value is not None and one.state in _DOTS and math.isfinite(one.value)]
    sections = [
        ("", _head(record, best, command)),
        ("Objective", _legend(best) + grid([_by_trial(record, shown, best), _curves(record, shown, best)])),
        ("By option", grid([_by_option(one, record, shown, best) for one in record.space])),
        ("What the differences come from", _shares(importances)),
        ("Trials", _all(record, results)),
        ("The search", _search(record)),
    ]
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' * bool(title)}{content}</section>" for title, content in sections if content
    )
    return document(name, f"Sweep of {record.recipe}, {_counts(results)}", body)


def _counts(results: Sequence[TrialResult]) -> str:
    states = [one.state for one in results]
    each = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(states)} trial{'s' * (len(states) != 1)}" + (f" ({each})" if each else "")


def _head(record: SweepRecord, best: TrialResult | None, command: str) -> str:
    if best is None or best.value is None:
        return "<p>No trial is complete.</p>"
    options = ", ".join(f"{name} {_text(value)}" for name, value in best.options.items())
    spread = f" &plusmn; {short(best.spread)}" if best.spread is not None else ""
    return (
        f"<p><b>Best: {escape(record.objective)} {best.value:.6g}{spread}</b>, trial {best.number}: {escape(options)}. "
        f"Its folder is <code>{best.folder}</code>. To train again:</p><pre>{escape(command)}</pre>"
    )


def _legend(best: TrialResult | None) -> str:
    kinds = [("complete", COMPLETE), ("pruned", PRUNED)] + [("best", BEST)] * (best is not None)
    items = "".join(f'<span><i class="{kind}"></i>{name}</span>' for name, kind in kinds)
    return f'<p class="soft legend">{items}</p>'


def _text(value: object) -> str:
    return short(value) if isinstance(value, float) else str(value)


def _points(
    shown: Sequence[TrialResult], best: TrialResult | None, places: Iterable[float], record: SweepRecord
) -> list[Point]:
    points = []
    for one, x in zip(shown, places, strict=True):
        assert one.value is not None
        options = ", ".join(f"{name} {_text(value)}" for name, value in one.options.items())
        is_best = best is not None and one.number == best.number
        about = f"trial {one.number}, {one.state}: {record.objective} {short(one.value)}; {options}"
        points.append(Point(x=x, y=one.value, kind=BEST if is_best else _DOTS[one.state], about=about))
    return sorted(points, key=lambda point: point.kind == BEST)  # drawn last


def _by_trial(record: SweepRecord, shown: Sequence[TrialResult], best: TrialResult | None) -> str:
    """Return the objective of each trial, and the best so far."""
    points = _points(shown, best, [one.number for one in shown], record)
    line: list[tuple[float, float]] = []
    for one in sorted(shown, key=lambda one: one.number):
        if one.state == "complete" and one.value is not None:
            value = one.value
            if line:
                value = (min if record.is_min else max)(value, line[-1][1])
                line.append((one.number, line[-1][1]))
            line.append((one.number, value))
    x_axis = Axis(0, max((one.number for one in shown), default=1), *axis_of("x"))
    return figure(
        f"{record.objective} by trial",
        "line: the best so far",
        points,
        x_axis=x_axis,
        x_ticks=[(value, f"{value:.0f}") for value in x_axis.ticks(5) if float(value).is_integer()],
        x_name="trial",
        lines=[("c1", line)] if line else [],
    )


def _curves(record: SweepRecord, shown: Sequence[TrialResult], best: TrialResult | None) -> str:
    """Return the objective by evaluation, a line per trial."""
    drawn = [one for one in shown if len(one.values) > 1][:_MOST_CURVES]  # the best
    if not drawn:
        return ""
    has_folds = any(one.spread is not None for one in drawn)
    lines = []
    for one in reversed(drawn):
        is_best = best is not None and one.number == best.number
        kind = "c1" if is_best else f"{_DOTS[one.state].split()[0]} faint"
        lines.append((kind, [(number, value) for number, value in enumerate(one.values, start=1)]))
    x_axis = Axis(1, max(len(one.values) for one in drawn), *axis_of("x"))
    about = ["the mean of the folds so far"] * has_folds
    about += [f"{len(drawn)} of {len(shown)} trials: those with two or more"] * (len(drawn) < len(shown))
    return figure(
        f"{record.objective} by {'fold' if has_folds else 'evaluation'}",
        ", ".join(about),
        [],
        x_axis=x_axis,
        x_ticks=[(value, f"{value:.0f}") for value in x_axis.ticks(5) if float(value).is_integer()],
        x_name="fold" if has_folds else "evaluation",
        lines=lines,
    )


def _by_option(name: str, record: SweepRecord, shown: Sequence[TrialResult], best: TrialResult | None) -> str:
    """Return the objective against an option's values."""
    if not shown:
        return ""
    values = [one.options[name] for one in shown if name in one.options]
    if len(values) < len(shown):
        return ""
    if any(isinstance(value, str) for value in values):
        kinds = record.space[name].split(" | ")
        names = [*kinds, *(value for value in dict.fromkeys(map(str, values)) if value not in kinds)]
        places = [float(names.index(str(value))) for value in values]
        x_axis = Axis(-0.5, len(names) - 0.5, *axis_of("x"))
        ticks = [(float(number), f"{one[:9]}…" if len(one) > 10 else one) for number, one in enumerate(names)]
        unit = ""
    else:
        places = [float(value) for value in values]
        is_log = record.space[name].endswith(", log")
        low, high = min(places), max(places)
        x_axis = Axis(low, high, *axis_of("x"), is_log=is_log)
        ticks = [(value, short(value)) for value in _few(x_axis.ticks(4))]
        unit = "log scale" * is_log
    points = _points(shown, best, places, record)
    return figure(name, unit, points, x_axis=x_axis, x_ticks=ticks, x_name="", lines=[])


def _few(ticks: Sequence[float], most: int = 6) -> Sequence[float]:
    return ticks[:: max(1, math.ceil(len(ticks) / most))]


def _shares(importances: Mapping[str, float]) -> str:
    if not importances:
        return ""
    rows = [
        [escape(name), f'<span class="share" style="width:{max(1, 160 * share):.0f}px"></span>{100 * share:.0f} %']
        for name, share in importances.items()
    ]
    return table(("option", "share (fANOVA, of the complete trials)"), rows)


def _all(record: SweepRecord, results: Sequence[TrialResult]) -> str:
    has_spread = any(one.spread is not None for one in results)
    has_message = any(one.message for one in results)
    names = [*record.space]
    heads = ["trial", "state", escape(record.objective)] + ["&plusmn;"] * has_spread + ["step", "time"]
    heads += [*map(escape, names)] + ["why it failed"] * has_message
    rows = []
    for one in results:
        row = [str(one.number), one.state, f"{one.value:.6g}" if one.value is not None else ""]
        row += [short(one.spread) if one.spread is not None else ""] * has_spread
        row += [f"{one.step:,}" if one.step is not None else ""]
        row += [duration(one.seconds) if one.seconds is not None else ""]
        row += [escape(_text(one.options.get(name, ""))) for name in names]
        rows.append(row + [escape(one.message)] * has_message)
    count = len(heads)
    return table(heads, rows, numbers=range(2, 5 + has_spread), long=(count - 1,) if has_message else ())


def _search(record: SweepRecord) -> str:
    rows = [["sampler", escape(record.sampler)], ["pruner", escape(record.pruner)], ["seed", str(record.seed)]]
    rows += [[escape(name), escape(values)] for name, values in record.space.items()]
    return table(("what", "value"), rows)

"""The sections of a report's page."""

import base64
import math
import re
import time
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

from shardlaunch.checkpoints.records import RunRecord
from shardlaunch.launcher.commands.report.charts import Line, chart, short
from shardlaunch.launcher.commands.report.look import NUM_COLORS
from shardlaunch.launcher.commands.report.parts import duration, grid, key, letter, named, table
from shardlaunch.launcher.commands.report.reading import Medium, RunFacts
from shardlaunch.launcher.option_fields import flag
from shardlaunch.launcher.reporting.tracking import EMA_PREFIX, EVAL_PREFIX, EVAL_PREFIXES, TRAIN_PREFIX

_NOT_CURVES = ("samples", "tokens", "step_s")
_UNITS = {"loss": "loss per target", "grad_norm": "L2 norm before clipping"}
_TITLES = {"lr": "learning rate", "grad_norm": "gradient norm"}
_MOST_CLASSES = 30
_ABSENT = object()
_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b")
# They say where a run is, not what it is.
_PLACES = ("output_dir", "run_name", "config", "resume", "project")


def overview(runs: Sequence[RunFacts]) -> str:
    """Return a table with one row per run."""
    rows = []
    for number, run in enumerate(runs):
        position, record = run.position, run.record
        best = "none"
        if position is not None and position.best_value is not None:
            best = f"{escape(position.best_metric)} {short(position.best_value)} at step {position.best_step:,}"
        where = f"{record.ranks} ranks, {escape(record.strategy)}" if record and record.ranks > 1 else "1 rank"
        recipe = str(record.identity.get("recipe", "")) if record else ""
        last = "; ".join(
            f"{escape(name.removeprefix(EVAL_PREFIX))} {short(value)}"
            for name, value in run.evaluation.items()
            if name.startswith(EVAL_PREFIX) and isinstance(value, int | float)
        )
        trained = sum(run.series["step_s"].values) if "step_s" in run.series else 0.0
        rows.append(
            [
                named(number, run.name),
                escape(recipe),
                _state(run),
                best,
                last or "none",
                escape(duration(trained)) if trained else "",
                where if record else "",
            ]
        )
    heads = ("run", "recipe", "state", "best", "last evaluation", "time in steps", "on")
    return table(heads, rows, numbers=(5,), long=(4,))


def _state(run: RunFacts) -> str:
    step = max(run.last_step, run.position.step if run.position else 0)
    if run.position is not None and run.position.is_finished:
        early = " early" if run.position.has_stopped_early else ""
        return f"finished{early} at step {step:,}"
    saved = f", saved at {run.position.step:,}" if run.position is not None else ", no checkpoint"
    return f"not finished: at step {step:,}{saved}" if step else "not begun"


def differences(runs: Sequence[RunFacts]) -> str:
    """Return tables of what differs between runs, and of all options."""
    heads = ("option", *(key(number) for number in range(len(runs))))
    facts = _facts(runs)
    every = [[escape(name), *map(_value, values)] for name, values in facts.items()]
    shared = {name for name, values in facts.items() if _ABSENT not in values}
    differing = [[name, *cells] for name, *cells in every if len({*cells}) > 1]
    of_all = [row for row in differing if row[0] in shared]
    of_some = [row for row in differing if row[0] not in shared]
    parts = []
    if len(runs) > 1:
        parts.append(table(heads, of_all) if of_all else "<p>Nothing: options, data and versions are the same.</p>")
    if len(runs) > 1 and of_some:
        parts.append(f"<details><summary>What only some of the runs have</summary>{table(heads, of_some)}</details>")
    if every:
        parts.append(f"<details><summary>All options and versions</summary>{table(heads, every)}</details>")
    return "".join(parts)


def _facts(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """Return options, data and versions by name, each for all runs."""
    names = dict.fromkeys(name for run in runs for name in run.options if name not in _PLACES)
    facts = {flag(name): [run.options.get(name, _ABSENT) for run in runs] for name in names}
    others = [_other_facts(run.record) if run.record is not None else {} for run in runs]
    for title in dict.fromkeys(title for one in others for title in one):
        facts[title] = [one.get(title, _ABSENT) for one in others]
    return facts


def _other_facts(record: RunRecord) -> dict[str, Any]:
    """Return what a record says besides the options: ranks, data, versions."""
    compared = {**record.warn, **record.identity}
    others = {name: value for name, value in compared.items() if not name.startswith("--")}
    return {"ranks": record.ranks, "strategy in use": record.strategy, **others, **record.versions, **record.machine}


def _value(value: Any) -> str:
    if value is _ABSENT:
        return '<span class="soft">&ndash;</span>'
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = _DIGEST.sub(r"\1…", text)
    return escape(text) if text else '<span class="soft">empty</span>'


def curves(runs: Sequence[RunFacts], kind: Literal["evaluation", "training"]) -> str:
    """Return a chart per metric that any of the runs has; of evaluations with that of the average of the weights."""
    names: dict[str, None] = {}
    for run in runs:
        for name in run.series:
            is_evaluation = name.startswith(EVAL_PREFIXES)
            if is_evaluation == (kind == "evaluation") and name not in _NOT_CURVES:
                names[_plain(name)] = None
    charts = []
    for name in sorted(names, key=lambda name: name != "loss"):
        lines = []
        for number, run in enumerate(runs):
            prefixes = EVAL_PREFIXES if kind == "evaluation" else ("", TRAIN_PREFIX)
            lines += [
                Line(
                    letter=letter(number),
                    color=number % NUM_COLORS,
                    series=run.series[one],
                    is_average=one.startswith(EMA_PREFIX),
                    has_dots=kind == "evaluation",
                )
                for one in (f"{prefix}{name}" for prefix in prefixes)
                if one in run.series
            ]
        unit = _UNITS.get(name, "")
        charts.append(chart(_TITLES.get(name, name), unit, lines, is_noisy=kind == "training" and name != "lr"))
    return grid(charts)


def _plain(name: str) -> str:
    for prefix in (EMA_PREFIX, EVAL_PREFIX, TRAIN_PREFIX):
        name = name.removeprefix(prefix)
    return name


def faults(runs: Sequence[RunFacts]) -> str:
    """Return starts, steps that were left out or skipped, ranks that hung, and files that could not be read."""
    rows = []
    for number, run in enumerate(runs):
        starts = "<br>".join(
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(start.at_s))} "
            f"{f'from step {start.from_step:,}' if start.from_step else 'from the beginning'}"
            for start in run.starts
        )
        said = [f"batches of steps {one.first:,} to {one.last:,} left out: {escape(one.cause)}" for one in run.left_out]
        if run.skipped:
            said.append(f"{len(run.skipped):,} updates skipped, the first at step {run.skipped[0]:,}")
        said += [f"hang: {escape(text)}" for text in run.hangs]
        said += [escape(text) for text in run.problems]
        rows.append(
            [
                named(number, run.name),
                f"{len(run.starts)}" if run.starts else "not recorded",
                starts,
                "<br>".join(said) or "none",
            ]
        )
    return table(("run", "starts", "when", "faults, and what could not be read"), rows, numbers=(1,), long=(2, 3))


def matrices(runs: Sequence[RunFacts]) -> str:
    """Return the square matrices of the last evaluations, as tables shaded by the share of their row."""
    parts = []
    for number, run in enumerate(runs):
        names: Sequence[str] = run.evaluations[-1].class_names if run.evaluations else ()
        where = f"in training, step {run.evaluation.get('step', 0):,}"
        found = [
            (name.removeprefix(EVAL_PREFIX), where, value, names)
            for name, value in run.evaluation.items()
            if name.startswith(EVAL_PREFIX)
        ]
        for record in run.evaluations:
            kind = "average of the weights, " * (record.weights == "average")
            about = f"{record.data} {record.split}".strip() + f", {kind}step {record.step:,}"
            found += [(name, about, value, record.class_names) for name, value in record.metrics.items()]
        parts += [
            f"<div><h3>{key(number)}{escape(name)} <span class=soft>{escape(about)}</span></h3>"
            f"{_matrix(value, classes)}</div>"
            for name, about, value, classes in found
            if _is_square(value)
        ]
    return grid(parts)


def _is_square(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 < len(value) <= _MOST_CLASSES
        and all(isinstance(row, list) and len(row) == len(value) for row in value)
        and all(isinstance(one, int | float) for row in value for one in row)
    )


def _matrix(rows: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    heads = [escape(name[:14]) for name in names] if len(names) == len(rows) else list(map(str, range(len(rows))))
    lines = []
    for number, row in enumerate(rows):
        total = sum(abs(value) for value in row if math.isfinite(value)) or 1.0
        shares = [abs(value) / total if math.isfinite(value) else 0.0 for value in row]
        cells = "".join(
            f'<td class="{"hit" * (number == column)}" style="background:rgba(var(--heat),{0.55 * share:.2f})">'
            f"{short(value)}</td>"
            for column, (value, share) in enumerate(zip(row, shares, strict=True))
        )
        lines.append(f"<tr><th>{heads[number]}</th>{cells}</tr>")
    top = "".join(f"<th>{head}</th>" for head in heads)
    return (
        f'<div class="wide"><table class="matrix"><caption>rows: true, columns: predicted; shade: share of the row'
        f"</caption><tr><th></th>{top}</tr>{''.join(lines)}</table></div>"
    )


def samples(runs: Sequence[RunFacts]) -> str:
    """Return the pictures, texts and tables that hooks have kept last."""
    parts = []
    for number, run in enumerate(runs):
        for medium in run.media:
            head = f"<h3>{key(number)}{escape(medium.name)} <span class=soft>step {medium.step:,}</span></h3>"
            more = f'<p class="soft">{escape(medium.more)}</p>' if medium.more else ""
            parts.append(f"<div>{head}{_medium(medium)}{more}</div>")
    return grid(parts)


def _medium(medium: Medium) -> str:
    if medium.picture:
        data = base64.b64encode(medium.picture).decode()
        return f'<img alt="{escape(medium.name)}" src="data:image/png;base64,{data}">'
    if medium.rows:
        heads, *rows = [[escape(cell) for cell in row] for row in medium.rows]
        return table(heads, rows)
    return f"<pre>{escape(medium.text)}</pre>" if medium.text else ""

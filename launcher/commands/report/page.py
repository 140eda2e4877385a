"""The page of a report: sections of HTML from the facts of runs."""

import time
from collections.abc import Iterable, Sequence
from html import escape

from shardlaunch.launcher.commands.report.look import SCRIPT, STYLE
from shardlaunch.launcher.commands.report.parts import key
from shardlaunch.launcher.commands.report.reading import RunFacts
from shardlaunch.launcher.commands.report.sections import (
    curves,
    differences,
    faults,
    matrices,
    overview,
    samples,
)
from shardlaunch.launcher.commands.report.times import times

GENERATOR = "shardlaunch report"
# Nothing may be asked of the network, whatever stands in a run.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[RunFacts]) -> str:
    """Return the report of runs as one HTML document, which needs nothing besides."""
    keys = "".join(f"<span>{key(number)}{escape(run.name)}</span>" for number, run in enumerate(runs))
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections: Iterable[tuple[str, str, str]] = (
        ("", "", overview(runs)),
        ("What differs", "Options, data and versions that are not the same in all runs.", differences(runs)),
        ("Evaluation", _of_average(runs), curves(runs, "evaluation")),
        ("Training", "", curves(runs, "training")),
        ("Time and memory", "", times(runs)),
        ("Starts and faults", "", faults(runs)),
        ("Matrices of the last evaluation", "", matrices(runs)),
        ("Samples", "Pictures, texts and tables that hooks have kept last.", samples(runs)),
    )
    body = "".join(_section(*one) for one in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}: training report</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="soft">Training report, made {made}</p></header>'
        f'<nav class="keys" aria-label="Runs">{keys}</nav>{body}</main><script>{SCRIPT}</script></body></html>'
    )


def _of_average(runs: Sequence[RunFacts]) -> str:
    has_average = any(name.startswith("eval_ema/") for run in runs for name in run.series)
    return "Dashed, with a stroke behind the letter: of the average of the weights." if has_average else ""


def _section(title: str, about: str, content: str) -> str:
    if not content:
        return ""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f"<section>{head}{f'<p class=soft>{escape(about)}</p>' if about else ''}{content}</section>"

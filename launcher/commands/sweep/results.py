"""What a sweep has found: a table of its best trials, the command that trains again, which options matter."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardlaunch.launcher.commands.ckpt.output import print_json, print_table
from shardlaunch.launcher.commands.report.parts import duration
from shardlaunch.launcher.commands.sweep.page import write_page
from shardlaunch.launcher.commands.sweep.record import SweepRecord, TrialResult, best_of, ranked, result_of
from shardlaunch.launcher.commands.sweep.search import Search

MOST_SHOWN = 10


def show(folder: Path, record: SweepRecord, search: Search, *, as_json: bool) -> int:
    """Print what a sweep has found so far, and write its page. Return the exit status: 1 if no trial is complete."""
    results = ranked([result_of(trial) for trial in search.trials()], is_min=record.is_min)
    best = best_of(results, is_min=record.is_min)
    importances = search.importances()
    command = again(record, best) if best is not None else ""
    page = write_page(folder, record, results, importances, command)
    if as_json:
        print_json(_document(folder, record, results, importances, command))
        return 0 if best is not None else 1
    print()
    print_table(table_of(record, results[:MOST_SHOWN]), right=(2, 3, 4))
    if len(results) > MOST_SHOWN:
        print(f"and {len(results) - MOST_SHOWN} more, in {page} and with --json")
    print()
    if importances:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in importances.items())
        print(f"what the differences come from (fANOVA): {shares}")
    if best is None:
        print("no trial is complete")
    else:
        print(f"best   trial {best.number}: {record.objective} {best.value:.6g}: {folder / best.folder}")
        print(f"again  {command}")
    print(f"page   {page}")
    return 0 if best is not None else 1


def table_of(record: SweepRecord, results: Sequence[TrialResult]) -> list[list[str]]:
    """Return the rows of a table of trials, the first of which is the heading."""
    has_spread = any(result.spread is not None for result in results)
    names = [*record.space]
    rows = [["trial", "state", record.objective, *["+-"] * has_spread, "step", "time", *names]]
    for one in results:
        rows.append(
            [
                str(one.number),
                one.state,
                shown(one.value),
                *[shown(one.spread)] * has_spread,
                f"{one.step:,}" if one.step is not None else "",
                duration(one.seconds) if one.seconds is not None else "",
                *(shown(one.options.get(name)) for name in names),
            ]
        )
    return rows


def shown(value: Any) -> str:
    """Return a value in a table."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def again(record: SweepRecord, best: TrialResult) -> str:
    """Return the command that trains with the options of a trial."""
    return shlex.join(["shardlaunch", "run", *record.recipe_words, *best.words])


def _document(
    folder: Path,
    record: SweepRecord,
    results: Sequence[TrialResult],
    importances: Mapping[str, float],
    command: str,
) -> dict[str, Any]:
    best = best_of(results, is_min=record.is_min)
    return {
        "folder": str(folder),
        "recipe": record.recipe,
        "objective": record.objective,
        "direction": record.direction,
        "sampler": record.sampler,
        "pruner": record.pruner,
        "seed": record.seed,
        "best": best.number if best is not None else None,
        "command": command,
        "importances": dict(importances),
        "trials": [
            {
                "number": one.number,
                "state": one.state,
                "objective": one.value,
                "spread": one.spread,
                "step": one.step,
                "seconds": one.seconds,
                "options": dict(one.options),
                "folder": one.folder,
                "message": one.message,
                "evaluations": list(one.values),
            }
            for one in results
        ],
    }

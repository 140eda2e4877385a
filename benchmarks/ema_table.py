"""The table of benchmarks/ema_gain.py for the docs."""

from collections.abc import Sequence
from typing import Any


def titles_and_rows(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles, and a row per arm: accuracies in percent at the end, their means and deviations over seeds."""
    titles = ["run", "epochs", "seeds", "weights, accuracy", "average, accuracy", "gain, points"]
    rows = [
        [
            f"`{options}`, {rate}",
            str(result["epochs"]),
            str(row["seeds"]),
            *(_percent(row[what], row["seeds"]) for what in ("weights", "average", "gain")),
        ]
        for result in results
        for row in result["rows"]
        for rate, _, options in [row["arm"].partition(", ")]
    ]
    return titles, rows


def _percent(summary: dict[str, float], seeds: int) -> str:
    deviation = f" (± {100 * summary['std']:.1f})" if seeds > 1 else ""
    return f"{100 * summary['mean']:.1f}{deviation}"

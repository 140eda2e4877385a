"""The page of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shardlaunch.launcher.commands.sweep.record import SweepRecord, TrialResult

PAGE = "sweep.html"


def write_page(
    folder: Path,
    record: SweepRecord,
    results: Sequence[TrialResult],
    importances: Mapping[str, float],
    command: str,
) -> Path:
    return folder / PAGE

"""The files of benchmarks/results: where they are, how they are written, and which machine they are of."""

import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for the docs."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int) -> list[float]:
    """Return median, least and most, rounded."""
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


def machine() -> dict[str, str]:
    """Return what a figure depends on besides the software: Python, processor, system."""
    return {
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cpu": _cpu(),
        "system": platform.system(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages by name."""
    return {package: version(package) for package in packages}


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return f"{len(names)} cores of {names[0].partition(':')[2].strip()}" if names else platform.processor()

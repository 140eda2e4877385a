"""Metrics on disk: metrics.jsonl, one JSON object per line."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVAL_PREFIX = "eval/"


class MetricsLog:
    """Append lines to metrics.jsonl, after cutting it back to the step that the run resumes from. Rank 0."""

    def __init__(self, output_dir: Path, *, resumed_step: int) -> None:
        self.path = output_dir / METRICS_FILE
        lines = [line for line in read_metrics(output_dir) if line["step"] <= resumed_step]
        staged = self.path.with_suffix(".staged")
        with open(staged, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        staged.rename(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._unwritten = b""

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, at once. What a full disk does not take is kept for the next time."""
        self._unwritten += json.dumps(line).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._write()

    def sync(self) -> None:
        """Make the lines durable, so that a checkpoint never knows of more steps than the log. Raises OSError."""
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without a last one that a crash cut short."""
    path = output_dir / METRICS_FILE
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def last_evaluation(output_dir: Path) -> dict[str, Any]:
    """Return the line of a run's last evaluation in metrics.jsonl, empty when there was none."""
    evaluations = [line for line in read_metrics(output_dir) if f"{EVAL_PREFIX}loss" in line]
    return evaluations[-1] if evaluations else {}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are one number."""
    return {name: value for name, value in values.items() if not isinstance(value, list)}

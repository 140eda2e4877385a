"""Metrics on disk: metrics.jsonl, one JSON object per line."""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.records import MOST_BYTES, DamagedRecord, open_regular, read_metrics_line, to_json

METRICS_FILE = "metrics.jsonl"
EVAL_PREFIX = "eval/"


class MetricsLog:
    """Append lines to metrics.jsonl, after cutting it back to the step that the run resumes from. Rank 0.

    The evaluation of that step goes too if the run has yet to do it. `warn` gets a message on each damaged line, which
    the cut leaves out.
    """

    def __init__(
        self, output_dir: Path, *, resumed_step: int, is_evaluation_due: bool = False, warn: Callable[[str], None]
    ) -> None:
        self.path = output_dir / METRICS_FILE
        lines = [line for line in read_metrics(output_dir, warn=warn) if line["step"] <= resumed_step]
        while is_evaluation_due and lines and lines[-1]["step"] == resumed_step and _is_evaluation(lines[-1]):
            lines.pop()
        staged = self.path.with_suffix(".staged")
        staged.unlink(missing_ok=True)
        with open(staged, "xb") as file:
            file.writelines(to_json(line) + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        staged.rename(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._unwritten = b""

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, at once. What a full disk does not take is kept for the next time."""
        self._unwritten += to_json(line) + b"\n"
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


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith(EVAL_PREFIX) for name in line)


def read_metrics(output_dir: Path, *, warn: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without a last one that a crash cut short.

    `warn` (default: a Python warning) gets a message on any other line that is damaged, and so left out. Raises
    UserError if it is no regular file.
    """
    path = output_dir / METRICS_FILE
    if not os.path.lexists(path):
        return []
    lines = []
    with open_regular(path) as raw, open(raw.fileno(), "rb", closefd=False) as file:
        for number in count(1):
            text = file.readline(MOST_BYTES)
            if not text.endswith(b"\n"):
                if len(text) == MOST_BYTES:
                    raise DamagedRecord(f"{path}: line {number} has no end. Move the file away, to go on without it")
                break
            try:
                lines.append(read_metrics_line(path, text))
            except DamagedRecord as error:
                (warn or warnings.warn)(f"line {number} is left out: {error}")
    return lines


def last_evaluation(output_dir: Path) -> dict[str, Any]:
    """Return the line of a run's last evaluation in metrics.jsonl, empty when there was none."""
    evaluations = [line for line in read_metrics(output_dir) if f"{EVAL_PREFIX}loss" in line]
    return evaluations[-1] if evaluations else {}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are one number."""
    return {name: value for name, value in values.items() if not isinstance(value, list)}

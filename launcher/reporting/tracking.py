"""Metrics on disk: metrics.jsonl, one JSON object a line, and accelerate's trackers beside it."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardlaunch.errors import UserError

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


class Trackers:
    """Pass metrics on to accelerate's trackers. Rank 0, once accelerate's state is set up.

    A tracker whose files cannot be written is dropped with a warning: it must not end the run.
    """

    def __init__(
        self,
        names: list[str],
        output_dir: Path,
        *,
        resumed_step: int,
        options: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._warn = warn
        self._trackers: list[Any] = []
        for name in names:
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                # It drops what an earlier process logged after the step resumed from. It is not given the options:
                # its summary of them would show as a run of its own.
                tracker = tracker_class("tensorboard", output_dir, purge_step=resumed_step + 1)
            elif tracker_class.requires_logging_directory:
                tracker = tracker_class(output_dir.name, output_dir)
            else:
                tracker = tracker_class(output_dir.name)
            tracker.start()
            if name != "tensorboard":
                tracker.store_init_configuration(dict(options))
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""
        self._tell(lambda tracker: tracker.log(dict(values), step=step))

    def close(self) -> None:
        """Finish all trackers."""
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, message: Callable[[Any], object]) -> None:
        for tracker in list(self._trackers):
            try:
                message(tracker)
            except OSError as error:
                self._warn(f"tracker {tracker.name} is dropped: {error}")
                self._trackers.remove(tracker)


def tracker_names(option: str) -> list[str]:
    """Return the trackers that --tracker names. Raises UserError for unknown or missing ones."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [name.strip() for name in option.split(",") if name.strip() not in ("", "none")]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--tracker {name}: unknown; choose none or some of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise UserError(f"--tracker {name}: its package is not installed; here are {', '.join(available)}")
    return names

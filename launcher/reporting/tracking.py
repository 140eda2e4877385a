"""Metrics on disk: metrics.jsonl, one JSON object per line."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.files import is_there, naming, replace_file, retried
from shardlaunch.checkpoints.records import DIGESTS, MOST_BYTES, DamagedRecord, open_regular, read_metrics_line, to_json
from shardlaunch.launcher.reporting.lasting import LastingFile

METRICS_FILE = "metrics.jsonl"
EVALUATIONS = "evaluations"
"""Folder in that of a run, with one file per evaluation of `shardlaunch evaluate`."""
EVAL_PREFIX = "eval/"
TRAIN_PREFIX = "train/"
"""Of what a recipe logs in training."""
EMA_PREFIX = "eval_ema/"
"""Before the names of results of the average of the weights (--ema, --swa-from)."""
EVAL_PREFIXES = (EVAL_PREFIX, EMA_PREFIX)


class MetricsLog:
    """Append lines to metrics.jsonl, after cutting it back to the step that the run resumes from. Rank 0.

    The evaluation of that step goes too if the run has yet to do it. `warn` gets a message on each damaged line, which
    the cut leaves out, and when the file cannot be written for a while: then the lines wait in memory.
    """

    def __init__(
        self, output_dir: Path, *, resumed_step: int, is_evaluation_due: bool = False, warn: Callable[[str], None]
    ) -> None:
        self.path = output_dir / METRICS_FILE
        self.last_evaluation: dict[str, Any] = {}
        """Line of the last evaluation that is kept, empty where there is none."""
        self._resumed_step = resumed_step
        self._is_evaluation_due = is_evaluation_due
        self._warn = warn
        self._file = LastingFile(self.path, prepare=self._cut_back, warn=warn)
        self._file.attempt()

    def _cut_back(self) -> int:
        """Write the lines up to the resumed step anew, and return their bytes."""
        found: list[str] = []

        def read() -> list[dict[str, Any]]:
            found.clear()
            return read_metrics(self.path.parent, warn=found.append)

        lines = [line for line in retried(read) if line["step"] <= self._resumed_step]
        while (
            self._is_evaluation_due and lines and lines[-1]["step"] == self._resumed_step and is_evaluation(lines[-1])
        ):
            lines.pop()
        data = b"".join(to_json(line) + b"\n" for line in lines)
        replace_file(self.path, data)
        for text in found:
            self._warn(text)
        self.last_evaluation = _last_evaluation(lines)
        return len(data)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, at once where that is possible."""
        self._file.append(to_json(line) + b"\n")

    def sync(self) -> None:
        """Make the lines durable, so that a checkpoint never knows of more steps than the log. Raises OSError."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Return whether a line of metrics.jsonl has results of an evaluation."""
    return any(name.startswith(EVAL_PREFIXES) for name in line)


def read_metrics(output_dir: Path, *, warn: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, as `metrics_lines` yields them."""
    return list(metrics_lines(output_dir, warn=warn))


def metrics_lines(output_dir: Path, *, warn: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics.jsonl, without a last one that a crash cut short.

    `warn` (default: a Python warning) gets a message on any other line that is damaged, and so left out. Raises
    UserError if it is no regular file.
    """
    path = output_dir / METRICS_FILE
    if not is_there(path):
        return
    with open_regular(path) as raw, naming(path), open(raw.fileno(), "rb", closefd=False) as file:
        for number in count(1):
            text = file.readline(MOST_BYTES)
            if not text.endswith(b"\n"):
                if len(text) == MOST_BYTES:
                    raise DamagedRecord(f"{path}: line {number} has no end. Move the file away, to go on without it")
                break
            try:
                yield read_metrics_line(path, text)
            except DamagedRecord as error:
                (warn or warnings.warn)(f"line {number} is left out: {error}")


def recorded_digests(output_dir: Path, *, warn: Callable[[str], None] = lambda text: None) -> dict[int, dict[str, Any]]:
    """Return what a run with --digest-every has recorded, by step: the loss, and the digests after the step.

    `warn` (default: nothing, as a resume names them) gets a message on each damaged line, which is left out.
    """
    lines = retried(lambda: read_metrics(output_dir, warn=warn))
    of_steps = (line for line in lines if any(name in line for name in DIGESTS))
    return {line["step"]: {name: line[name] for name in ("loss", *DIGESTS) if name in line} for line in of_steps}


def last_evaluation(output_dir: Path) -> dict[str, Any]:
    """Return the line of a run's last evaluation in metrics.jsonl, empty when there was none."""
    return _last_evaluation(retried(lambda: read_metrics(output_dir)))


def _last_evaluation(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    evaluations = [line for line in lines if is_evaluation(line)]
    return evaluations[-1] if evaluations else {}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are one number."""
    return {name: value for name, value in values.items() if not isinstance(value, list)}

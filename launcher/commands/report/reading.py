"""What a report says of a run, read from its folder alone: no torch, no data, no recipe."""

import csv
import io
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.files import error_text
from shardlaunch.checkpoints.finding import Run, newest_valid, runs_at
from shardlaunch.checkpoints.names import CHECKPOINTS
from shardlaunch.checkpoints.records import (
    DamagedRecord,
    EvaluationRecord,
    LeftOut,
    Position,
    RunRecord,
    read_bytes,
    read_record,
)
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.media import MEDIA
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIXES, EVALUATIONS, METRICS_FILE, metrics_lines
from shardlaunch.launcher.runs.folder import RUN
from shardlaunch.launcher.training.hang_report import HANGS

TENSORBOARD = "tensorboard"
_NO_METRICS = ("step", "epoch", "left_out", "skipped", "weights_digest", "optimizer_digest", "ema_digest")
_MOST_EVENT_BYTES = 64 << 20
_MOST_MEDIA = 6
_MOST_PICTURE_BYTES = 300_000
_MOST_TEXT = 2_000
_MOST_ROWS = 12


@dataclass(kw_only=True)
class Series:
    """A metric by step."""

    steps: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        """Append a point."""
        self.steps.append(step)
        self.values.append(value)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of a run, as its file for TensorBoard has it."""

    at_s: float
    from_step: int


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A picture, text or table that a hook has kept."""

    name: str
    step: int
    picture: bytes = b""
    text: str = ""
    rows: Sequence[Sequence[str]] = ()
    more: str = ""
    """What is not shown of it."""


@dataclass(kw_only=True)
class RunFacts:
    """What is known of a run."""

    path: Path
    name: str
    record: RunRecord | None = None
    position: Position | None = None
    """That of the newest valid checkpoint."""
    series: dict[str, Series] = field(default_factory=dict)
    parts: dict[str, Series] = field(default_factory=dict)
    """Median over the ranks of the seconds of each part of a step."""
    slowest: dict[str, Series] = field(default_factory=dict)
    """The same of the slowest rank."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Line of the last evaluation."""
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    """Of `shardlaunch evaluate`."""
    num_lines: int = 0
    last_step: int = 0
    skipped: list[int] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    memory: Series = field(default_factory=Series)
    hangs: list[str] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options by name, empty where run.json is not there."""
        return {name: option.value for name, option in self.record.options.items()} if self.record else {}


def read_runs(paths: Sequence[Path]) -> list[RunFacts]:
    """Return the facts of runs, and of each fold of a cross-validation. Raises UserError for what is no run."""
    folders: list[Path] = []
    for path in paths:
        folders += [folder for folder in _folders(path) if folder not in folders]
    names = _names(folders)
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> RunFacts:
    """Return the facts of one run. What cannot be read of it is among its problems."""
    facts = RunFacts(path=folder, name=name)
    try:
        facts.record = read_record(folder / RUN, RunRecord)
        facts.left_out = list(facts.record.left_out)
    except DamagedRecord as error:
        facts.problems.append(f"options are not known: {error}")
    try:
        newest = newest_valid(Run(path=folder, checkpoints_dir=folder / CHECKPOINTS), warn=facts.problems.append)
        facts.position = newest.position
    except UserError as error:
        facts.problems.append(str(error))
    _read_metrics(facts)
    _read_evaluations(facts)
    _read_events(facts)
    _read_hangs(facts)
    _read_media(facts)
    return facts


def _folders(path: Path) -> list[Path]:
    path = path.expanduser()
    if path.is_dir() and ((path / METRICS_FILE).exists() or (path / RUN).exists()):
        return [path]
    folders = [run.run_dir for run in runs_at(path) if run.only is None]
    if not folders or None in folders:
        raise UserError(f"{path}: is a checkpoint, where the output folder of a run is expected")
    return [folder for folder in folders if folder is not None]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the runs apart; a fold is named with its run."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-max(length, 2 if one[-1].startswith("fold-") else 1) :]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return names


def _read_metrics(facts: RunFacts) -> None:
    damaged: list[str] = []
    try:
        for line in metrics_lines(facts.path, warn=damaged.append):
            facts.num_lines += 1
            step = line["step"]
            facts.last_step = max(facts.last_step, step)
            if line.get("skipped"):
                facts.skipped.append(step)
            if any(name.startswith(EVAL_PREFIXES) for name in line):
                facts.evaluation = line
            for name, value in line.items():
                if name in _NO_METRICS:
                    continue
                if name.startswith("ranks_") and isinstance(value, list) and len(value) == 3:
                    part = name.removeprefix("ranks_").removesuffix("_s")
                    facts.parts.setdefault(part, Series()).add(step, value[1])
                    facts.slowest.setdefault(part, Series()).add(step, value[2])
                elif not isinstance(value, list):
                    facts.series.setdefault(name, Series()).add(step, value)
    except (OSError, UserError) as error:
        facts.problems.append(error_text(error))
    if damaged:
        facts.problems.append(f"{METRICS_FILE}: {len(damaged):,} damaged lines are left out; the first: {damaged[0]}")
    for name in [name for name, series in facts.series.items() if name == "tokens" and not any(series.values)]:
        del facts.series[name]


def _read_evaluations(facts: RunFacts) -> None:
    for path in sorted((facts.path / EVALUATIONS).glob("*.json")):
        try:
            facts.evaluations.append(read_record(path, EvaluationRecord))
        except DamagedRecord as error:
            facts.problems.append(str(error))


def _read_events(facts: RunFacts) -> None:
    """Read when the run was started, and its memory, from what it has written for TensorBoard."""
    files = sorted((facts.path / TENSORBOARD).glob("events.out.tfevents.*"))
    if not files:
        return
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for file in files:
        if file.stat().st_size > _MOST_EVENT_BYTES:
            facts.problems.append(f"{file.name}: larger than {_MOST_EVENT_BYTES >> 20} MB, so its memory is not shown")
            continue
        at_s, from_step = 0.0, 0
        try:
            for data in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(data)
                at_s = at_s or event.wall_time
                if event.session_log.status == SessionLog.START:
                    from_step = max(0, event.step - 1)
                for value in event.summary.value:
                    if value.tag == "memory_bytes":
                        facts.memory.add(event.step, value.simple_value)
        except Exception as error:  # of a file that a kill has cut, each library has its own
            facts.problems.append(f"{file.name}: {' '.join(str(error).split())[:200] or type(error).__name__}")
        facts.starts.append(Start(at_s=at_s, from_step=from_step))
    facts.starts.sort(key=lambda start: start.at_s)


def _read_hangs(facts: RunFacts) -> None:
    for path in sorted((facts.path / HANGS).rglob("*.txt"))[:_MOST_MEDIA]:
        try:
            first = read_bytes(path).decode(errors="replace").strip().partition("\n")[0]
        except DamagedRecord as error:
            first = str(error)
        facts.hangs.append(f"{path.name}: {first[:300]}")


def _read_media(facts: RunFacts) -> None:
    """Read what hooks have kept at the last step that has any."""
    steps = sorted((facts.path / MEDIA).glob("step-*"))
    files = sorted(steps[-1].iterdir()) if steps else []
    for path in files[:_MOST_MEDIA]:
        step = int("".join(letter for letter in steps[-1].name if letter.isdigit()) or 0)
        try:
            facts.media.append(_medium(path, step))
        except (OSError, UserError, csv.Error) as error:
            facts.problems.append(error_text(error))
    if len(files) > _MOST_MEDIA:
        facts.problems.append(f"{steps[-1].name}: {len(files) - _MOST_MEDIA} more pictures, texts and tables")


def _medium(path: Path, step: int) -> Medium:
    if path.suffix == ".png":
        if path.stat().st_size > _MOST_PICTURE_BYTES:
            return Medium(name=path.stem, step=step, more=f"{path.stat().st_size / 1e6:.1f} MB, in {path}")
        return Medium(name=path.stem, step=step, picture=read_bytes(path))
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(read_bytes(path).decode(errors="replace"), newline="")))
        more = f"the first {_MOST_ROWS} of {len(rows) - 1:,} rows" if len(rows) > _MOST_ROWS + 1 else ""
        shown = [[cell[:_MOST_TEXT] for cell in row] for row in rows[: _MOST_ROWS + 1]]
        return Medium(name=path.stem, step=step, rows=shown, more=more)
    text = read_bytes(path).decode(errors="replace")
    more = f"the first {_MOST_TEXT:,} of {len(text):,} characters" if len(text) > _MOST_TEXT else ""
    return Medium(name=path.stem, step=step, text=text[:_MOST_TEXT], more=more)

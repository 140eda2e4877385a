"""What a sweep is: the record in its folder, which a later start must agree with, and its trials as results."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from shardlaunch.checkpoints.files import error_text, is_there, make_folder, replace_file
from shardlaunch.checkpoints.records import DamagedRecord, Record, read_record, to_json
from shardlaunch.checkpoints.run_lock import LOCK
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.sweep.space import ASIDE, SPEED_ONLY
from shardlaunch.launcher.option_fields import flag
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.runs.identity import option_values, versions

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SWEEP = "sweep.json"
SECONDS, STEP, MESSAGE, SPREAD, WORDS = "seconds", "step", "message", "spread", "words"
"""What the records of trials say besides the options and the objective."""


class SweepRecord(Record):
    """sweep.json of a sweep's folder."""

    recipe: str
    recipe_words: list[str]
    """Of the command `shardlaunch run`, up to the searched options."""
    objective: str
    direction: str
    space: dict[str, str]
    """Each option's values, as text."""
    fixed: dict[str, Any]
    """Options that are the same for all trials."""
    sampler: str
    pruner: str
    seed: int
    versions: dict[str, str]

    @property
    def is_min(self) -> bool:
        """Whether a lower objective is better."""
        return self.direction == "min"


def fixed_values(options: Options, searched: Sequence[str]) -> dict[str, Any]:
    """Return the options that all trials share and that decide what they find."""
    apart = {*searched, *ASIDE, *SPEED_ONLY}
    return {name: value for name, value in option_values(options).items() if name not in apart}


def check_folder(folder: Path, record: SweepRecord) -> bool:
    """Create the folder of a sweep, and return whether it holds the sweep already.

    Raises UserError if it holds another sweep, or something else, or cannot be created.
    """
    try:
        if not is_there(folder / SWEEP):
            if is_there(folder) and any(one.name != LOCK for one in folder.iterdir()):
                raise UserError(f"--output-dir {folder}: holds something else than a sweep; choose another folder")
            make_folder(folder)
            return False
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be used: {error_text(error)}; choose another") from error
    if found := _differences(read_sweep(folder), record):
        raise UserError(
            f"--output-dir {folder}: holds another sweep ({', '.join(found)}). To go on with it, use its values. To "
            f"start a new one, choose another --output-dir"
        )
    return True


def write_sweep(folder: Path, record: SweepRecord) -> None:
    """Write the record of a sweep; of one that goes on, the number of ranks may be another. Raises UserError."""
    try:
        replace_file(folder / SWEEP, to_json(structs.asdict(record), indent=1))
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be used: {error_text(error)}; choose another") from error


def read_sweep(folder: Path) -> SweepRecord:
    """Return the record of the sweep in a folder. Raises UserError where there is none."""
    if not is_there(folder / SWEEP):
        raise UserError(f"{folder}: is no sweep's folder: it has no {SWEEP}")
    try:
        return read_record(folder / SWEEP, SweepRecord)
    except DamagedRecord as error:
        raise UserError(f"{error}. Choose another --output-dir") from error


def _differences(saved: SweepRecord, here: SweepRecord) -> list[str]:
    """Return what makes two sweeps different ones, with both values."""
    pairs: list[tuple[str, Any, Any]] = [("recipe", saved.recipe, here.recipe)]
    for name in ("objective", "direction", "sampler", "pruner", "seed"):
        pairs.append((flag(name), getattr(saved, name), getattr(here, name)))
    for name in {**saved.space, **here.space}:
        pairs.append((f"{name} in --space", saved.space.get(name, "not there"), here.space.get(name, "not there")))
    for name in {**saved.fixed, **here.fixed}:
        if name not in {**saved.space, **here.space}:
            pairs.append((flag(name), saved.fixed.get(name), here.fixed.get(name)))
    return [f"{what}: {one!r} -> {other!r}" for what, one, other in pairs if one != other]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial of a sweep."""

    number: int
    state: str
    """complete, pruned, failed or running."""
    value: float | None
    """Objective: of the best evaluation, over folds of their mean; None where there is none yet."""
    spread: float | None
    """Standard deviation over the folds."""
    step: int | None
    """Of the evaluation that the objective is of."""
    seconds: float | None
    options: Mapping[str, float | int | str]
    words: Sequence[str]
    """The options as words of a command line."""
    message: str
    """Why it has failed."""
    values: Sequence[float]
    """Of its evaluations or folds in turn."""

    @property
    def folder(self) -> str:
        """Return the name of its folder, in that of the sweep."""
        return f"trial-{self.number:04d}"


_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "running"}


def result_of(trial: "FrozenTrial") -> TrialResult:
    """Return a trial as a result."""
    values = [value for _, value in sorted(trial.intermediate_values.items())]
    about = trial.user_attrs
    return TrialResult(
        number=trial.number,
        state=_STATES[trial.state.name],
        value=trial.value if trial.state.name in ("COMPLETE", "PRUNED") else values[-1] if values else None,
        spread=about.get(SPREAD),
        step=about.get(STEP),
        seconds=about.get(SECONDS),
        options=dict(trial.params),
        words=about.get(WORDS, ()),
        message=about.get(MESSAGE, ""),
        values=values,
    )


def ranked(results: Sequence[TrialResult], *, is_min: bool) -> list[TrialResult]:
    """Return trials with the best complete one first, then pruned, running and failed ones."""
    order = ("complete", "pruned", "running", "failed")
    sign = 1 if is_min else -1

    def key(result: TrialResult) -> tuple[int, float, int]:
        return order.index(result.state), sign * result.value if result.value is not None else 0.0, result.number

    return sorted(results, key=key)


def best_of(results: Sequence[TrialResult], *, is_min: bool) -> TrialResult | None:
    """Return the best of the complete trials, None if there is none."""
    first = next(iter(ranked(results, is_min=is_min)), None)
    return first if first is not None and first.state == "complete" else None


def spread_of(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def new_record(**fields: Any) -> SweepRecord:
    """Return a record with the versions of this environment."""
    return SweepRecord(**fields, versions=versions())

"""Find the checkpoints that a path means: of a run, of a folder of checkpoints, of a cross-validation, or one.

Imports no torch.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardlaunch.checkpoints.listing import DamagedCheckpoint
from shardlaunch.checkpoints.names import (
    CHECKPOINTS,
    MANIFEST,
    REPLACED_PREFIX,
    STAGING_PREFIX,
    TRASH_PREFIX,
    step_dir_name,
    step_of_dir_name,
)
from shardlaunch.checkpoints.verifying import ListedCheckpoint, look_at
from shardlaunch.errors import UserError, some

BEST = "best"
_FOLD_DIR = re.compile(r"fold-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The checkpoints of a run, or only one of them."""

    path: Path
    """Folder of the run, or what stands for it."""
    checkpoints_dir: Path
    only: Path | None = None
    """The one checkpoint that is meant."""

    @property
    def run_dir(self) -> Path | None:
        """Return the run's output folder, None for a folder of checkpoints that stands alone."""
        folder = Path(os.path.abspath(self.checkpoints_dir))
        return self.checkpoints_dir.parent if folder.name == CHECKPOINTS else None

    def step_dirs(self) -> list[Path]:
        """Return the folders of the checkpoints by step, valid or not."""
        if self.only is not None:
            return [self.only]
        steps = sorted(step for name in _names(self.checkpoints_dir) if (step := step_of_dir_name(name)) is not None)
        return [self.checkpoints_dir / step_dir_name(step) for step in steps]

    def leftovers(self) -> list[Path]:
        """Return the folders of saves, copies and deletions that are under way, or that a crash has left."""
        if self.only is not None:
            return []
        names = _names(self.checkpoints_dir)
        return [
            self.checkpoints_dir / name
            for name in names
            if name.startswith((STAGING_PREFIX, TRASH_PREFIX, REPLACED_PREFIX))
        ]


def runs_at(path: Path) -> list[Run]:
    """Return the run at a path, one per fold of a cross-validation. Raises UserError if there is none.

    The path is an output folder, its folder of checkpoints, a checkpoint, or `best` in one of the first two.
    """
    path = _expanded(path)
    if not os.path.lexists(path):
        if path.name == BEST and path.parent.is_dir():
            best = checkpoint_at(path, warn=lambda _: None)
            return [Run(path=path, checkpoints_dir=best.parent, only=best)]
        raise UserError(f"{path}: no such folder")
    if not path.is_dir():
        raise UserError(f"{path}: is a file, where the folder of a run or of a checkpoint is expected")
    if (path / MANIFEST).exists() or step_of_dir_name(path.name) is not None:
        return [Run(path=path, checkpoints_dir=path.parent, only=path)]
    if (path / CHECKPOINTS).is_dir():
        return [Run(path=path, checkpoints_dir=path / CHECKPOINTS)]
    names = _names(path)
    if path.name == CHECKPOINTS or any(step_of_dir_name(name) is not None for name in names):
        return [Run(path=path, checkpoints_dir=path)]
    folds = {int(match[1]): path / name for name in names if (match := _FOLD_DIR.fullmatch(name))}
    runs = [
        Run(path=folder, checkpoints_dir=folder / CHECKPOINTS)
        for _, folder in sorted(folds.items())
        if (folder / CHECKPOINTS).is_dir()
    ]
    if not runs:
        raise UserError(
            f"{path}: neither a run (with a folder {CHECKPOINTS}/), nor a checkpoint (with a {MANIFEST}), nor a folder "
            f"of checkpoints (step-N/)"
        )
    return runs


def checkpoint_at(path: Path, *, warn: Callable[[str], None], step: int | None = None) -> Path:
    """Return the folder of the one checkpoint that a path means: itself, or of a run the newest valid one.

    `step` chooses another one of a run, a last component `best` the best one. Valid is after a quick check; `warn`
    gets a message on each damaged one that is passed over. Raises UserError if there is none.
    """
    path = _expanded(path)
    wants_best = path.name == BEST and not os.path.lexists(path)
    runs = runs_at(path.parent if wants_best else path)
    if len(runs) > 1:
        raise UserError(f"{path}: is a cross-validation; choose a fold, such as {runs[0].path}")
    (run,) = runs
    if run.only is not None:
        if step is not None or wants_best:
            chosen = f"--step {step}" if step is not None else BEST
            raise UserError(f"{path}: is a checkpoint already; {chosen} chooses one of a run")
        return run.only
    if step is not None and not wants_best:
        return _of_step(run, step)
    newest = newest_valid(run, warn=warn)
    if not wants_best:
        return newest.step_dir
    if newest.position.best_value is None:
        raise UserError(f"{run.path}: has no best checkpoint, because it was not evaluated")
    return _of_step(run, newest.position.best_step)


def best_step(run: Run, *, warn: Callable[[str], None] = lambda _: None) -> int | None:
    """Return the step of a run's best evaluation, as its newest valid checkpoint has it; None if there is none."""
    try:
        position = newest_valid(run, warn=warn).position
    except UserError:
        return None
    return None if position.best_value is None else position.best_step


def _of_step(run: Run, step: int) -> Path:
    step_dirs = {step_of_dir_name(path.name): path for path in run.step_dirs()}
    if step not in step_dirs:
        raise UserError(f"{run.path}: has no checkpoint of step {step}; it has {some(map(str, step_dirs)) or 'none'}")
    return step_dirs[step]


def newest_valid(run: Run, *, warn: Callable[[str], None]) -> ListedCheckpoint:
    """Return a run's newest checkpoint that a quick check finds valid. Raises UserError if there is none."""
    damaged: list[str] = []
    for step_dir in reversed(run.step_dirs()):
        try:
            found = look_at(step_dir)
        except UserError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warn(f"skipped a damaged checkpoint: {message}")
        return found
    if damaged:
        raise DamagedCheckpoint(f"{run.path}: no valid checkpoint ({damaged[0]})")
    raise UserError(f"{run.path}: no checkpoint in this folder")


def _expanded(path: Path) -> Path:
    if "://" in os.fspath(path) or re.match(r"^\w+:/\w", os.fspath(path)):
        raise UserError(f"{path}: a URL, which only `shardlaunch ckpt copy` takes; copy the checkpoint here first")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from error


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error

"""Delete a run's older checkpoints from outside: only where enough that are valid to the last bit stay. No torch."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardlaunch.checkpoints.finding import Run, newest_valid
from shardlaunch.checkpoints.listing import DamagedCheckpoint
from shardlaunch.checkpoints.names import REPLACED_PREFIX, TRASH_PREFIX
from shardlaunch.checkpoints.verifying import ListedCheckpoint, look_at, verify
from shardlaunch.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which checkpoints of a run stay, and which are deleted."""

    kept: tuple[Path, ...]
    """The newest ones, verified."""
    best: Path | None
    deleted: tuple[ListedCheckpoint, ...]
    damaged: tuple[str, ...]
    """Messages on damaged ones, which do not count, and stay."""
    leftovers: tuple[Path, ...]
    """Of saves and deletions that did not end."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the checkpoints to delete."""
        return sum(checkpoint.num_bytes for checkpoint in self.deleted)


def plan_pruning(run: Run, *, keep: int) -> Pruning:
    """Return what keeping the newest `keep` valid checkpoints and the best one of a run means.

    Those that are kept are digested, so that a good one is never deleted in favour of one that only looks so.
    Raises UserError where none is valid.
    """
    best_value = newest_valid(run, warn=lambda _: None).position
    best_step = None if best_value.best_value is None else best_value.best_step
    kept: list[Path] = []
    damaged: list[str] = []
    deleted: list[ListedCheckpoint] = []
    best: Path | None = None
    for step_dir in reversed(run.step_dirs()):
        try:
            checkpoint = look_at(step_dir)
        except UserError as error:
            damaged.append(str(error))
            continue
        if checkpoint.step == best_step:
            best = step_dir
        if len(kept) < keep:
            verdict = verify(step_dir)
            if verdict.is_valid:
                kept.append(step_dir)
            else:
                damaged += [f"{step_dir / one.file}: {one.what}" for one in verdict.damages[:1]]
        elif step_dir != best:
            deleted.append(checkpoint)
    if not kept:
        raise DamagedCheckpoint(f"{run.path}: no valid checkpoint ({damaged[0]}); nothing is deleted")
    return Pruning(
        kept=tuple(kept),
        best=best,
        deleted=tuple(deleted),
        damaged=tuple(damaged),
        leftovers=tuple(run.leftovers()),
    )


def carry_out(pruning: Pruning, *, on_deleted: Callable[[Path], None] = lambda _: None) -> None:
    """Delete what a pruning deletes, the oldest first, and the leftovers. The run's lock must be held.

    Raises UserError where something cannot be deleted.
    """
    for path in pruning.leftovers:
        if path.name.startswith(REPLACED_PREFIX):
            _restore_or_delete(path)
        else:
            _delete(path)
    for checkpoint in reversed(pruning.deleted):
        # Rename first: a crash midway must not leave half a folder under a checkpoint's name.
        trash = checkpoint.step_dir.with_name(f"{TRASH_PREFIX}{checkpoint.step_dir.name}")
        try:
            checkpoint.step_dir.rename(trash)
        except OSError as error:
            raise UserError(f"{checkpoint.step_dir}: cannot be deleted: {error.strerror}") from error
        _delete(trash)
        on_deleted(checkpoint.step_dir)


def _restore_or_delete(replaced: Path) -> None:
    """Give a checkpoint that a save had no time to replace its name again, as the next start of the run would."""
    target = replaced.with_name(replaced.name.removeprefix(REPLACED_PREFIX))
    if target.exists():
        _delete(replaced)
        return
    try:
        replaced.rename(target)
    except OSError as error:
        raise UserError(f"{replaced}: cannot be renamed: {error.strerror}") from error


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be deleted: {error.strerror}") from error

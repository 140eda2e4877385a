"""Delete old checkpoints and leftovers of a crash. Rank 0, after a commit."""

import shutil
from collections.abc import Collection
from pathlib import Path

from shardlaunch.checkpoints.layout import step_dir_name
from shardlaunch.checkpoints.reader import checkpoint_steps
from shardlaunch.checkpoints.writer import REPLACED_PREFIX, STAGING_PREFIX, TRASH_PREFIX


def prune(checkpoints_dir: Path, *, newest: int, keep: int, protected: Collection[int] = ()) -> None:
    """Keep the last `keep` checkpoints up to step `newest` (0: all) and the protected steps; delete the others.

    `newest` was just committed. Folders of later steps are damaged, or the run would have resumed from them: they do
    not count, and stay until they are saved again.
    """
    if keep == 0:
        return
    for step in [step for step in checkpoint_steps(checkpoints_dir) if step <= newest][:-keep]:
        if step not in protected:
            # Rename first: a crash midway must not leave half a folder under a checkpoint's name.
            trash = checkpoints_dir / f"{TRASH_PREFIX}{step_dir_name(step)}"
            shutil.rmtree(trash, ignore_errors=True)
            (checkpoints_dir / step_dir_name(step)).rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def sweep(checkpoints_dir: Path) -> None:
    """Delete the staging and trash folders that a crashed process left; restore what it had no time to replace."""
    for replaced in checkpoints_dir.glob(f"{REPLACED_PREFIX}*"):
        target = checkpoints_dir / replaced.name.removeprefix(REPLACED_PREFIX)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)
    for prefix in (STAGING_PREFIX, TRASH_PREFIX):
        for path in checkpoints_dir.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

"""Retention: which checkpoints stay, and what is deleted because of it or because a save did not end."""

from collections.abc import Callable, Collection
from pathlib import Path

from shardlaunch.checkpoints.files import delete_tree, discard, fsync, is_there
from shardlaunch.checkpoints.layout import step_dir_name
from shardlaunch.checkpoints.names import REPLACED_PREFIX, STAGING_PREFIX, TRASH_PREFIX
from shardlaunch.checkpoints.reader import checkpoint_steps


def prune(checkpoints_dir: Path, *, newest: int, keep: int, protected: Collection[int] = ()) -> list[OSError]:
    """Keep the last `keep` checkpoints up to step `newest` (0: all) and the protected steps; delete the others.

    `newest` was just committed, or is resumed from. Folders of later steps are damaged, or the run would have resumed
    from them: they do not count, and stay until they are saved again. Returns the errors of what could not be deleted.
    """
    if keep == 0:
        return []
    try:
        steps = checkpoint_steps(checkpoints_dir)
    except OSError as error:
        return [error]
    superfluous = [step for step in steps if step <= newest][:-keep]
    return _without(discard, [checkpoints_dir / step_dir_name(step) for step in superfluous if step not in protected])


def sweep(checkpoints_dir: Path) -> list[OSError]:
    """Delete the staging and trash folders that a crash or an error left; restore what it had no time to replace.

    Returns the errors of those that stay.
    """
    try:
        paths = list(checkpoints_dir.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        return [error]
    replaced = [path for path in paths if path.name.startswith(REPLACED_PREFIX)]
    others = [path for path in paths if path.name.startswith((STAGING_PREFIX, TRASH_PREFIX))]
    return _without(_restore, replaced) + _without(delete_tree, others)


def _restore(replaced: Path) -> None:
    target = replaced.with_name(replaced.name.removeprefix(REPLACED_PREFIX))
    if is_there(target):
        delete_tree(replaced)
    else:
        replaced.rename(target)
        fsync(target.parent)


def _without(delete: Callable[[Path], None], folders: list[Path]) -> list[OSError]:
    errors = []
    for folder in folders:
        try:
            delete(folder)
        except OSError as error:
            errors.append(error)
    return errors

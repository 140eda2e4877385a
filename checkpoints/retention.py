"""Retention: which checkpoints stay, and what is deleted because of it or because a save did not end."""

from collections.abc import Callable, Collection
from pathlib import Path

from shardlaunch.checkpoints.files import delete_tree, discard
from shardlaunch.checkpoints.layout import step_dir_name
from shardlaunch.checkpoints.names import STAGING_PREFIX, TRASH_PREFIX
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
    """Delete the staging and trash folders that a crash or an error left. Returns the errors of those that stay."""
    try:
        paths = list(checkpoints_dir.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        return [error]
    return _without(delete_tree, [path for path in paths if path.name.startswith((STAGING_PREFIX, TRASH_PREFIX))])


def _without(delete: Callable[[Path], None], folders: list[Path]) -> list[OSError]:
    errors = []
    for folder in folders:
        try:
            delete(folder)
        except OSError as error:
            errors.append(error)
    return errors

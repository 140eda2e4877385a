"""The output folder of a run: its lock, its records, and the checkpoint to resume from."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.files import come_again, is_there, is_transient, make_folder, replace_file, retried
from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.manifest import DamagedCheckpoint
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, checkpoint_steps, newest_valid, open_path, shared_steps
from shardlaunch.checkpoints.records import DamagedRecord, IdentityRecord, RunRecord, read_record, to_json
from shardlaunch.checkpoints.run_lock import HELD_BY_ANOTHER, LOCK, lock
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.trackers import TrackedRun
from shardlaunch.launcher.runs.identity import Identity

RUN = "run.json"


def run_folder(options: Options, recipe_name: str) -> Path:
    """Return the output folder: --output-dir, else outputs/ and --run-name, else the recipe's name and the preset's."""
    preset = f"-{options.preset}" if options.preset else ""
    return Path(options.output_dir or f"outputs/{options.run_name or recipe_name + preset}").expanduser()


def new_folder_hint(options: Options, output_dir: Path) -> str:
    """Return an option that lets the same command start a new run, in a folder that does not exist yet."""
    root = output_dir.parent if options.folds else output_dir
    if root.name in ("", ".."):
        root = root.resolve()
    names = (root.parent / f"{root.name}-{number}" for number in count(2))
    new = next(path for path in names if not path.exists())
    return f"--output-dir {new}" if options.output_dir else f"--run-name {new.name}"


@contextmanager
def claim(output_dir: Path, *, warn: Callable[[str], None]) -> Iterator[None]:
    """Create the folder and lock it. Rank 0. Raises UserError if it cannot be created or another run has locked it.

    `warn` gets a message where the file system has none. A folder that is new and was not used, because the run was
    refused, is removed at the end.
    """
    is_new = not os.path.lexists(output_dir)

    def opened() -> int:
        make_folder(output_dir / CHECKPOINTS)
        return os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT)

    try:
        descriptor = retried(opened)
    except OSError as error:
        raise UserError(
            f"--output-dir {output_dir}: cannot be created: {error.strerror}. Choose another folder."
        ) from error
    try:
        try:
            lock(descriptor)
            os.stat(output_dir / LOCK)  # the run that had it may have just removed it
        except OSError as error:
            if error.errno in (*HELD_BY_ANOTHER, errno.ENOENT):
                raise UserError(
                    f"--output-dir {output_dir}: another run is using it. Wait for it, or choose another folder."
                ) from None
            warn(
                f"--output-dir {output_dir}: cannot be locked ({error.strerror}). Nothing notices if a second run uses "
                f"this folder at the same time: see to it that none does"
            )
        try:
            yield
        finally:
            if is_new:
                _remove_unused(output_dir)
    finally:
        os.close(descriptor)


def _remove_unused(output_dir: Path) -> None:
    """Remove a folder that holds nothing but what `claim` has put there."""
    with suppress(OSError):
        if set(os.listdir(output_dir)) == {CHECKPOINTS, LOCK}:
            (output_dir / CHECKPOINTS).rmdir()  # an error if there are any
            (output_dir / LOCK).unlink()
            output_dir.rmdir()


def write_run(output_dir: Path, record: Mapping[str, Any]) -> None:
    """Write run.json atomically. Raises UserError if the folder is not writable."""
    try:
        write_json(output_dir / RUN, record)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: not writable: {error.strerror}. Choose another folder.") from error


def tracked_run(output_dir: Path, identity: Identity, *, project: str, name: str) -> TrackedRun:
    """Return the names of a run in trackers, with the id that its folder has for it, or a new one. Rank 0.

    The id is new where the folder holds no run, or one without a checkpoint that is another run.
    """
    try:
        saved = retried(lambda: read_record(output_dir / RUN, RunRecord))
    except DamagedRecord:  # or none yet: it is written anew
        saved = None
    kept = None
    if saved is not None and (checkpoint_steps(output_dir / CHECKPOINTS) or saved.identity == identity.identity):
        kept = saved.tracking_id or None
    return TrackedRun(
        project=project,
        name=name,
        tracking_id=kept or secrets.token_hex(8),
        is_new=not kept,
        output_dir=output_dir,
    )


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    replace_file(path, to_json(record, indent=1))


def find_checkpoint(
    resume: str, output_dir: Path, *, peers: Peers, display: Display, checks_tensors: bool = True
) -> Checkpoint | None:
    """Return the checkpoint selected by --resume, None to start from the beginning. All ranks.

    Without `checks_tensors` the values of its tensors are verified only as they are read (`Checkpoint.verify_read`).

    Raises UserError if there are checkpoints but none is valid, and if `never` would mix two runs in one folder.
    """
    checkpoints_dir = output_dir / CHECKPOINTS
    if resume == "never":
        if shared_steps(checkpoints_dir, peers=peers):
            raise UserError(
                f"--resume never: {output_dir} holds checkpoints of a run. Choose another --output-dir, or delete it."
            )
        return None
    if resume == "auto":
        try:
            return newest_valid(checkpoints_dir, peers=peers, warn=display.warn, checks_tensors=checks_tensors)
        except DamagedCheckpoint as error:
            raise UserError(
                f"{error}. To start from the beginning, delete them or choose another --output-dir."
            ) from error
    try:
        checkpoint = open_path(Path(resume), peers=peers, warn=display.warn, checks_tensors=checks_tensors)
    except UserError as error:
        raise UserError(f"--resume {error}") from error
    newer = [step for step in shared_steps(checkpoints_dir, peers=peers) if step > checkpoint.step]
    if newer and checkpoint.step_dir.resolve().parent == checkpoints_dir.resolve():
        # Going back in place would delete the metrics of steps that the newer checkpoints contain.
        raise UserError(
            f"--resume {resume}: {output_dir} holds newer checkpoints (steps {', '.join(map(str, newer))}). "
            f"Choose another --output-dir, or delete them."
        )
    return checkpoint


def identity_of_folder(output_dir: Path) -> IdentityRecord | None:
    """Return the identity record of the run in an output folder, None if it has no checkpoints."""
    path = output_dir / RUN
    try:
        return retried(lambda: read_record(path, RunRecord) if _holds_run(output_dir) else None)
    except (OSError, DamagedRecord) as error:
        if is_transient(error) or isinstance(error, OSError):
            raise come_again(error) from error
        raise UserError(
            f"{error}. Choose another --output-dir; or delete this file, for each checkpoint says which run it is of"
        ) from error


def _holds_run(output_dir: Path) -> bool:
    return is_there(output_dir / RUN) and bool(checkpoint_steps(output_dir / CHECKPOINTS))

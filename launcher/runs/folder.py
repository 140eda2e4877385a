"""The output folder of a run: who may use it, what it holds, and which checkpoint to resume from."""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.layout import CHECKPOINTS, RECIPE
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, checkpoint_steps, newest_valid, open_path
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.trackers import TrackedRun
from shardlaunch.launcher.runs.identity import Identity

RUN = "run.json"
TRACKING_ID = "tracking_id"  # its name in run.json
LOCK = ".lock"


def run_folder(options: Options, recipe_name: str) -> Path:
    """Return the output folder: --output-dir, else outputs/ and --run-name, else the recipe's name and the preset's."""
    preset = f"-{options.preset}" if options.preset else ""
    return Path(options.output_dir or f"outputs/{options.run_name or recipe_name + preset}").expanduser()


def new_folder_hint(options: Options, output_dir: Path) -> str:
    """Return the option that lets the same command start a new run, in a folder that is not there yet."""
    name = output_dir.name if not options.folds else output_dir.parent.name
    number = next(n for n in range(2, 1 << 30) if not (output_dir.parent / f"{name}-{n}").exists())
    if options.output_dir:
        return f"--output-dir {output_dir.parent / f'{name}-{number}'}"
    return f"--run-name {name}-{number}"


@contextmanager
def claim(output_dir: Path) -> Iterator[None]:
    """Create the folder and keep other runs out of it. Rank 0. Raises UserError when it is not to be written or taken.

    The lock is the system's: it ends with the process, however that ends, and is not passed on to its children.
    """
    try:
        (output_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(
            f"--output-dir {output_dir}: cannot be created: {error.strerror}. Choose another folder."
        ) from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"--output-dir {output_dir}: another run is using it. Wait for it, or choose another folder."
            ) from None
        yield
    finally:
        os.close(descriptor)


def write_run(output_dir: Path, record: Mapping[str, Any], *, least_bytes: int) -> None:
    """Write run.json, at once or not at all. Raises UserError when the folder is not writable or too full for a run."""
    try:
        free_bytes = shutil.disk_usage(output_dir).free
        if free_bytes < least_bytes:
            raise UserError(
                f"--output-dir {output_dir}: {free_bytes / 1e6:,.1f} MB are free; "
                f"one checkpoint takes at least {least_bytes / 1e6:,.1f} MB. Make room, or choose another folder."
            )
        write_json(output_dir / RUN, record)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: not writable: {error.strerror}. Choose another folder.") from error


def tracked_run(output_dir: Path, identity: Identity, *, project: str, name: str) -> TrackedRun:
    """Return the names of a run in trackers, with the id that its folder has for it, or a new one. Rank 0.

    The id is new where the folder holds no run, or one without a checkpoint that is another run.
    """
    saved: dict[str, Any] = {}
    if (output_dir / RUN).exists():
        with suppress(ValueError):  # then it is written anew
            saved = json.loads((output_dir / RUN).read_text())
    has_started = checkpoint_steps(output_dir / CHECKPOINTS) or saved.get("identity") == dict(identity.identity)
    kept = saved.get(TRACKING_ID) if has_started else None
    return TrackedRun(
        project=project,
        name=name,
        tracking_id=kept or secrets.token_hex(8),
        is_new=not kept,
        output_dir=output_dir,
    )


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file, at once or not at all."""
    staged = path.with_name(f".{path.name}.staged")
    with open(staged, "w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    staged.rename(path)


def find_checkpoint(resume: str, output_dir: Path, *, peers: Peers, display: Display) -> Checkpoint | None:
    """Return the checkpoint that --resume means, None to start at the beginning. All ranks.

    Raises UserError when there is something to resume from and nothing of it is valid, and when `never` would mix two
    runs in one folder.
    """
    checkpoints_dir = output_dir / CHECKPOINTS
    if resume == "never":
        if checkpoint_steps(checkpoints_dir):
            raise UserError(
                f"--resume never: {output_dir} holds checkpoints of a run. Choose another --output-dir, or remove it."
            )
        return None
    if resume == "auto":
        return newest_valid(checkpoints_dir, peers=peers, warn=display.warn)
    try:
        checkpoint = open_path(Path(resume), peers=peers, warn=display.warn)
    except UserError as error:
        raise UserError(f"--resume {error}") from error
    newer = [step for step in checkpoint_steps(checkpoints_dir) if step > checkpoint.step]
    if newer and checkpoint.step_dir.resolve().parent == checkpoints_dir.resolve():
        # Going back in place would cut the metrics of steps that the newer checkpoints vouch for.
        raise UserError(
            f"--resume {resume}: {output_dir} holds newer checkpoints (steps {', '.join(map(str, newer))}). "
            f"Give another --output-dir, or remove them."
        )
    return checkpoint


def saved_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the identity record of the run that a checkpoint is of."""
    record: dict[str, Any] = checkpoint.read_json(RECIPE)["run"]
    return record


def identity_of_folder(output_dir: Path) -> dict[str, Any] | None:
    """Return the identity record of the run that an output folder holds checkpoints of, None if it holds none."""
    path = output_dir / RUN
    if not path.exists() or not checkpoint_steps(output_dir / CHECKPOINTS):
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not readable ({error}); choose another --output-dir") from error
    return record

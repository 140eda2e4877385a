"""Copy the checkpoints of a run, with its records, to and from other places. Imports no torch."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shardlaunch.checkpoints.copying import Copied, copy_checkpoint
from shardlaunch.checkpoints.listing import DamagedCheckpoint
from shardlaunch.checkpoints.names import CHECKPOINTS, MANIFEST, step_dir_name, step_of_dir_name
from shardlaunch.checkpoints.places import LocalPlace, Place, digest_at, place_at
from shardlaunch.checkpoints.records import DamagedRecord, RunRecord, decode
from shardlaunch.checkpoints.run_lock import LOCK, locked
from shardlaunch.errors import UserError

RUN = "run.json"
RECORDS = (RUN, "metrics.jsonl")
FOLDS = "folds.json"
_FOLD_DIR = re.compile(r"fold-\d+")


@dataclass(kw_only=True)
class CopiedRun:
    """What a copy did."""

    checkpoints: list[Copied] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Messages on checkpoints that are damaged, or were deleted meanwhile."""


def copy_any(
    source_url: str, target_url: str, *, step: int | None = None, on_copied: Callable[[Copied], None] = lambda _: None
) -> CopiedRun:
    """Copy what is at `source_url`: a checkpoint, a folder of checkpoints, a run, or a cross-validation.

    The copy has the same folders as the source; `step` copies only that checkpoint of a run, to the same place in it.
    Local targets are locked as by a run. Raises UserError; a damaged checkpoint does not stop the others.
    """
    source, target = place_at(source_url), place_at(target_url)
    copied = CopiedRun()
    if source.shown == target.shown:
        raise UserError(f"{target.shown}: is the source of the copy; choose another target")
    if source.size(MANIFEST) is not None or step_of_dir_name(source.shown.rpartition("/")[2]) is not None:
        if step is not None:
            raise UserError(f"{source.shown}: is a checkpoint already; --step {step} chooses one of a run")
        copied.checkpoints.append(copy_checkpoint(source, target))
        on_copied(copied.checkpoints[0])
        return copied
    names = source.names()
    if isinstance(source, LocalPlace) and isinstance(target, LocalPlace):
        source_path, target_path = source.path.resolve(), target.path.resolve()
        if source_path in (target_path, *target_path.parents):
            raise UserError(f"{target.shown}: is in the source of the copy; choose another target")
    if CHECKPOINTS in names:
        _copy_run(source, target, step, copied, on_copied)
    elif any(step_of_dir_name(name) is not None for name in names):
        _copy_steps(source, target, step, copied, on_copied)
    else:
        folds = [name for name in names if _FOLD_DIR.fullmatch(name) and CHECKPOINTS in source.child(name).names()]
        if not folds:
            raise UserError(f"{source.shown}: {'no such folder' if not names else 'neither a run nor a checkpoint'}")
        for fold in folds:
            _copy_run(source.child(fold), target.child(fold), step, copied, on_copied)
        _copy_records(source, target, (FOLDS,), copied)
    return copied


def _copy_run(
    source: Place, target: Place, step: int | None, copied: CopiedRun, on_copied: Callable[[Copied], None]
) -> None:
    _refuse_another_run(source, target)
    with ExitStack() as stack:
        if isinstance(target, LocalPlace):
            stack.enter_context(_run_folder(target.path))
        _copy_steps(source.child(CHECKPOINTS), target.child(CHECKPOINTS), step, copied, on_copied)
        _copy_records(source, target, RECORDS, copied)


@contextmanager
def _run_folder(path: Path) -> Iterator[None]:
    """Make and lock the output folder of a run. One that is new and stays empty is removed at the end."""
    is_new = not os.path.lexists(path)
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from error
    try:
        with locked(path):
            yield
    finally:
        if is_new and set(os.listdir(path)) <= {CHECKPOINTS, LOCK}:
            with suppress(OSError):  # there are checkpoints
                (path / CHECKPOINTS).rmdir()
                (path / LOCK).unlink(missing_ok=True)
                path.rmdir()


def _copy_steps(
    source: Place, target: Place, step: int | None, copied: CopiedRun, on_copied: Callable[[Copied], None]
) -> None:
    steps = sorted(found for name in source.names() if (found := step_of_dir_name(name)) is not None)
    if step is not None:
        if step not in steps:
            raise UserError(
                f"{source.shown}: has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}"
            )
        steps = [step]
    for one in steps:
        name = step_dir_name(one)
        try:
            done = copy_checkpoint(source.child(name), target.child(name))
        except (DamagedCheckpoint, DamagedRecord) as error:
            copied.failed.append(str(error))
        except UserError as error:
            if source.child(name).size(MANIFEST) is not None:
                raise
            copied.failed.append(str(error))  # the run goes on, and has deleted it
        else:
            copied.checkpoints.append(done)
            on_copied(done)


def _refuse_another_run(source: Place, target: Place) -> None:
    """Refuse a target that holds another run: their checkpoints would mix."""
    records = []
    for place in (source, target):
        record = None
        if place.size(RUN) is not None:
            with suppress(UserError):  # a damaged one is replaced
                record = decode(f"{place.shown}/{RUN}", place.read(RUN), RunRecord)
        records.append(record)
    one, other = records
    if one is not None and other is not None and str(one.identity) != str(other.identity):
        raise UserError(f"{target.shown}: holds another run. Choose another target, or delete it")


def _copy_records(source: Place, target: Place, names: tuple[str, ...], copied: CopiedRun) -> None:
    """Copy the files beside the checkpoints, as they are now, and read them back."""
    target.make()
    for name in names:
        if source.size(name) is None:
            continue
        written = target.write(f"{name}", source.chunks(name))
        if digest_at(target, name, kind=written.kind) != written:
            raise UserError(f"{target.shown}/{name}: does not read back as it was written; copy it again")
        copied.records.append(name)

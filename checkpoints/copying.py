"""Copy checkpoints to and from other places: every file is verified by reading it back, the manifest comes last.

A URL is a local path or anything that fsspec knows: file://, memory://, s3://, gs://, sftp://. Imports no torch.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardlaunch.checkpoints.digests import FileRecord
from shardlaunch.checkpoints.files import fsync
from shardlaunch.checkpoints.listing import DamagedCheckpoint, file_records, listing_of
from shardlaunch.checkpoints.names import MANIFEST, STAGING_PREFIX, TRASH_PREFIX, step_dir_name, step_of_dir_name
from shardlaunch.checkpoints.places import LocalPlace, Place, committed_steps, digest_at, entries, place_at
from shardlaunch.checkpoints.records import DamagedRecord, ManifestRecord
from shardlaunch.errors import UserError, some


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What a copy of a checkpoint did."""

    source: str
    target: str
    step: int
    num_files: int
    """Files of the checkpoint, without the manifest."""
    num_skipped: int
    """Files of these that were there already, with the right digest."""
    num_bytes: int
    """Bytes written."""
    unlisted: tuple[str, ...] = ()
    """Files beside the checkpoint's own that the manifest does not list, and that were not copied."""


def copy_out(step_dir: Path, url: str, *, num_threads: int = 2) -> Copied:
    """Copy a local checkpoint folder to `url`, the URL of the checkpoint's own folder there. One process.

    A repeated copy writes only what is missing or wrong there. Until the manifest is written, as the last file, what
    is there is no checkpoint. Raises UserError: for a damaged source, for a target that holds something else, and for
    any failure of a disk or network, after which the same call goes on.
    """
    return copy_checkpoint(LocalPlace(step_dir), place_at(url), num_threads=num_threads)


def copy_in(url: str, step_dir: Path, *, num_threads: int = 2) -> Copied:
    """Copy the checkpoint at `url` to a local folder, which appears whole, by one rename. As `copy_out`."""
    return copy_checkpoint(place_at(url), LocalPlace(step_dir), num_threads=num_threads)


def steps_at(url: str) -> list[int]:
    """Return the steps whose checkpoints stand complete in the folder at `url`, ascending.

    Looks at names only: a copy that is not complete has no manifest. Raises UserError if the folder cannot be listed.
    """
    return committed_steps(place_at(url))


def listing_at(place: Place) -> ManifestRecord:
    """Return the manifest of the checkpoint at a place, checked. Raises UserError."""
    if place.size(MANIFEST) is None:
        raise DamagedCheckpoint(f"{place.shown}: no {MANIFEST}, so this is not a checkpoint")
    return _listing(place, place.read(MANIFEST))


def copy_checkpoint(source: Place, target: Place, *, num_threads: int = 2) -> Copied:
    """Copy a checkpoint from a place to another one, as `copy_out` does."""
    _refuse_same(source, target)
    manifest = source.read(MANIFEST) if source.size(MANIFEST) is not None else None
    if manifest is None:
        raise DamagedCheckpoint(f"{source.shown}: no {MANIFEST}, so this is not a checkpoint")
    record = _listing(source, manifest)
    named = step_of_dir_name(target.shown.rpartition("/")[2])
    if named not in (None, record.step):
        raise UserError(
            f"{target.shown}: the checkpoint is of step {record.step}; name it {step_dir_name(record.step)}"
        )
    files = file_records(record)
    unlisted = tuple(name for name in entries(source, files) if name not in files and name != MANIFEST)
    work = _Work(source=source, target=target, files=files, manifest=manifest, num_threads=num_threads)
    try:
        _check_sizes(source, files)
        _refuse_other(target, record, files)
        num_skipped = work.to_local(target) if isinstance(target, LocalPlace) else work.to_remote()
    except UserError as error:
        if _is_gone(source):
            raise UserError(f"{source.shown}: was deleted while it was copied (does its run go on?)") from error
        raise
    return Copied(
        source=source.shown,
        target=target.shown,
        step=record.step,
        num_files=len(files),
        num_skipped=num_skipped,
        num_bytes=work.num_bytes,
        unlisted=unlisted,
    )


def _listing(place: Place, data: bytes) -> ManifestRecord:
    """Return the manifest in `data`. Raises DamagedCheckpoint unless it is valid, and of the step of its folder."""
    record = listing_of(f"{place.shown}/{MANIFEST}", data)
    named = step_of_dir_name(place.shown.rpartition("/")[2])
    if named not in (None, record.step):
        raise DamagedCheckpoint(f"{place.shown}: holds step {record.step}")
    return record


def _is_gone(source: Place) -> bool:
    try:
        return source.size(MANIFEST) is None
    except UserError:
        return False


def _refuse_same(source: Place, target: Place) -> None:
    """Refuse a target that is the source or lies in it."""
    if isinstance(source, LocalPlace) and isinstance(target, LocalPlace):
        one, other = source.path.resolve(), target.path.resolve()
        is_in = other == one or one in other.parents
    else:
        is_in = f"{target.shown}/".startswith(f"{source.shown}/")
    if is_in:
        raise UserError(f"{target.shown}: is the source of the copy, or in it; choose another target")


def _check_sizes(source: Place, files: Mapping[str, FileRecord]) -> None:
    for name, file in files.items():
        num_bytes = source.size(name)
        if num_bytes != file.num_bytes:
            found = "no such file" if num_bytes is None else f"{num_bytes} bytes"
            raise DamagedCheckpoint(f"{source.shown}/{name}: {found}, but {file.num_bytes} bytes in the manifest")


def _refuse_other(target: Place, record: ManifestRecord, files: Mapping[str, FileRecord]) -> None:
    """Refuse a target that holds another checkpoint, or files of something else."""
    names = entries(target, files)
    there: ManifestRecord | None = None
    if MANIFEST in names:
        with suppress(UserError):  # a damaged one is written anew, beside files of the same names
            there = listing_at(target)
    if there is not None and there.xxh3_128 != record.xxh3_128:
        raise UserError(
            f"{target.shown}: holds another checkpoint (of step {there.step}). Choose another target, or delete it"
        )
    other = [name for name in names if name not in files and name != MANIFEST]
    if other and there is None:
        raise UserError(f"{target.shown}: exists and holds something else ({some(other, 3)}). Choose another target")


class _Stopped(UserError):
    """Raised in a thread after another one has failed."""


@dataclass(kw_only=True)
class _Work:
    """One copy of a checkpoint that is under way."""

    source: Place
    target: Place
    files: Mapping[str, FileRecord]
    manifest: bytes
    num_threads: int
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._counting = threading.Lock()

    def to_remote(self) -> int:
        """Write what is missing or wrong into the target, the manifest last. Return how many files were right."""
        wrong = self._wrong_files(self.target)
        is_whole = self.target.size(MANIFEST) is not None and self.target.read(MANIFEST) == self.manifest
        if wrong or not is_whole:
            self.target.make()
            self.target.remove(MANIFEST)  # first, so that a half copy is no checkpoint
            self._in_threads(lambda name: self._copy(name, self.target), wrong)
            self._write_manifest(self.target)
        return len(self.files) - len(wrong)

    def to_local(self, target: LocalPlace) -> int:
        """Write what is missing or wrong into a staging folder, and rename it. Return how many files were right."""
        path = Path(os.path.realpath(target.path))  # where a link leads, so that the rename stays on one disk
        shutil.rmtree(_trash(path), ignore_errors=True)  # of a copy that was killed
        if target.size(MANIFEST) is not None and target.read(MANIFEST) == self.manifest:
            wrong = self._wrong_files(target)
        else:
            wrong = [*self.files]
        if not wrong:
            return len(self.files)
        staging = LocalPlace(path.with_name(f"{STAGING_PREFIX}{path.name}"))
        try:
            self._reuse(path, staging.path)
            wrong = self._wrong_files(staging)
            self._check_room(staging.path, wrong)
            self._in_threads(lambda name: self._copy(name, staging), wrong)
            self._write_manifest(staging)
            _publish(staging.path, path)
        except (OSError, UserError) as error:
            reason = f"{error.filename or path}: {error.strerror}" if isinstance(error, OSError) else str(error)
            if self._is_worth_keeping(error):
                reason += f". What is copied stays in {staging.path}; the same copy goes on from there"
            else:
                shutil.rmtree(staging.path, ignore_errors=True)
            if isinstance(error, DamagedCheckpoint | DamagedRecord):
                raise
            raise UserError(reason) from error
        return len(self.files) - len(wrong)

    def _is_worth_keeping(self, error: OSError | UserError) -> bool:
        """Return whether a failed copy keeps its files for the next: those of a network, unless the disk is full."""
        cause = error if isinstance(error, OSError) else error.__cause__
        is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return not isinstance(self.source, LocalPlace) and not is_full and not isinstance(error, DamagedCheckpoint)

    def _check_room(self, folder: Path, names: Iterable[str]) -> None:
        needed, free = sum(self.files[name].num_bytes for name in names), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{free / 1e6:,.1f} MB are free, but {needed / 1e6:,.1f} MB are needed", folder)

    def _reuse(self, path: Path, staging: Path) -> None:
        """Make the staging folder, with the files of a damaged target in it, where the disk has hard links."""
        if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
            staging.unlink()
        staging.mkdir(parents=True, exist_ok=True)
        place = LocalPlace(staging)
        for name in entries(place, self.files):
            if name not in self.files:
                place.remove(name)
        for name in self.files:
            if path.is_dir() and not os.path.lexists(staging / name):
                with suppress(OSError):
                    (staging / name).parent.mkdir(exist_ok=True)
                    os.link(path / name, staging / name, follow_symlinks=False)

    def _wrong_files(self, place: Place) -> list[str]:
        """Return the files that are missing at a place, or have another size or digest there."""
        wrong: list[str] = []

        def check(name: str) -> None:
            file = self.files[name]
            try:
                is_right = place.size(name) == file.num_bytes and self._digest(place, name) == file
            except _Stopped:
                raise
            except UserError:
                is_right = False
            if not is_right:
                wrong.append(name)

        self._in_threads(check, self.files)
        return sorted(wrong)

    def _copy(self, name: str, place: Place) -> None:
        """Copy a file and read it back."""
        written = place.write(name, self._counted(self.source.chunks(name)), kind=self.files[name].kind)
        if written != self.files[name]:
            place.remove(name)
            raise DamagedCheckpoint(
                f"{self.source.shown}/{name}: the file is damaged (its digest differs from the manifest's)"
            )
        if self._digest(place, name) != written:
            raise UserError(f"{place.shown}/{name}: does not read back as it was written; copy it again")

    def _write_manifest(self, place: Place) -> None:
        place.write(MANIFEST, iter([memoryview(self.manifest)]))
        if place.read(MANIFEST) != self.manifest:
            raise UserError(f"{place.shown}/{MANIFEST}: does not read back as it was written; copy it again")

    def _digest(self, place: Place, name: str) -> FileRecord:
        return digest_at(place, name, kind=self.files[name].kind, check=self._check_stop)

    def _counted(self, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
        for chunk in chunks:
            self._check_stop()
            with self._counting:
                self.num_bytes += len(chunk)
            yield chunk

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped("stopped")

    def _in_threads(self, work: Callable[[str], None], names: Iterable[str]) -> None:
        """Run `work` for each file, some at a time. The first failure stops the others and is raised."""
        with ThreadPoolExecutor(max_workers=max(1, self.num_threads)) as pool:
            running = [pool.submit(work, name) for name in names]
            try:
                for one in as_completed(running):
                    one.result()
            except BaseException:  # an interrupt too
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def _publish(staging: Path, target: Path) -> None:
    """Give a complete staging folder its name, in place of a damaged one or of an empty folder."""
    fsync(staging)
    trash = _trash(target)
    if os.path.lexists(target):
        shutil.rmtree(trash, ignore_errors=True)
        target.rename(trash)
    staging.rename(target)
    fsync(target.parent)
    shutil.rmtree(trash, ignore_errors=True)


def _trash(path: Path) -> Path:
    return path.with_name(f"{TRASH_PREFIX}{path.name}")

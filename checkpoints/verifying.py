"""Check a checkpoint folder, quickly or to the last bit, and say which file is damaged and how. Imports no torch."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from shardlaunch.checkpoints.digests import FileRecord, crc64nvme, digest_file, joined
from shardlaunch.checkpoints.files import is_gone
from shardlaunch.checkpoints.headers import header_bytes, read_stored
from shardlaunch.checkpoints.listing import DamagedCheckpoint, file_records, read_listing, tensor_key
from shardlaunch.checkpoints.names import (
    MANIFEST,
    NUM_BYTES,
    RECIPE,
    SECTIONS,
    TRAINER_STATE,
    index_file_name,
    step_dir_name,
    step_of_dir_name,
)
from shardlaunch.checkpoints.places import LocalPlace, entries
from shardlaunch.checkpoints.records import (
    IndexRecord,
    ManifestRecord,
    Position,
    RecipeRecord,
    read_position,
    read_record,
    regular_size,
)
from shardlaunch.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ListedCheckpoint:
    """A checkpoint whose manifest is valid, whose files have their sizes, and whose position is known."""

    step_dir: Path
    record: ManifestRecord
    position: Position

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all its files but the manifest."""
        return sum(entry.bytes for entry in self.record.files.values())

    @property
    def recipe(self) -> RecipeRecord | None:
        """Return recipe.json, None where there is none. Raises UserError for a damaged one."""
        return read_record(self.step_dir / RECIPE, RecipeRecord) if RECIPE in self.record.files else None


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What is wrong with a file of a checkpoint."""

    file: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a verification."""

    step_dir: Path
    num_files: int
    num_bytes: int
    damages: tuple[Damage, ...]
    unlisted: tuple[str, ...]
    """Files in the folder that the manifest does not list."""
    is_gone: bool = False
    """Whether the folder was deleted meanwhile, as a run that goes on does with old checkpoints."""

    @property
    def is_valid(self) -> bool:
        return not self.damages and not self.is_gone


def look_at(step_dir: Path) -> ListedCheckpoint:
    """Return a checkpoint after a quick check: manifest, sizes, position. Raises UserError that begins with a path."""
    record = _manifest(step_dir)
    for name, file in file_records(record).items():
        what = _size_damage(step_dir / name, file)
        if what:
            raise DamagedCheckpoint(f"{step_dir / name}: {what}")
    return ListedCheckpoint(step_dir=step_dir, record=record, position=_position(step_dir, record))


def verify(step_dir: Path, *, num_threads: int = 2) -> Verdict:
    """Check all of a checkpoint: every digest, the headers of its files, and its records. Some files at a time."""
    try:
        record = _manifest(step_dir)
    except UserError as error:
        gone = is_gone(step_dir)
        damage = Damage(file=MANIFEST, what=_without_path(error, step_dir / MANIFEST, step_dir))
        damages = () if gone else (damage,)
        return Verdict(step_dir=step_dir, num_files=0, num_bytes=0, damages=damages, unlisted=(), is_gone=gone)
    files = file_records(record)
    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        found = pool.map(partial(_file_damage, step_dir, record), files.items())
        of_files = [Damage(file=name, what=what) for name, what in zip(files, found, strict=True) if what]
    damaged = {damage.file for damage in of_files}
    of_files += [damage for damage in _record_damages(step_dir, record) if damage.file not in damaged]
    gone = is_gone(step_dir / MANIFEST)
    return Verdict(
        step_dir=step_dir,
        num_files=len(files),
        num_bytes=sum(file.num_bytes for file in files.values()),
        damages=() if gone else tuple(of_files),
        unlisted=() if gone else _unlisted(step_dir, files),
        is_gone=gone,
    )


def _manifest(step_dir: Path) -> ManifestRecord:
    record = read_listing(step_dir)
    if step_of_dir_name(step_dir.name) not in (None, record.step):
        raise DamagedCheckpoint(
            f"{step_dir}: holds step {record.step}; is it a copy? Give the folder the name "
            f"{step_dir_name(record.step)}, or delete it"
        )
    return record


def _position(step_dir: Path, record: ManifestRecord) -> Position:
    path = step_dir / TRAINER_STATE
    position = read_position(path, is_first_version=record.version == 1)
    if position.step != record.step:
        raise DamagedCheckpoint(f"{path}: is of step {position.step}, the manifest of step {record.step}")
    return position


def _size_damage(path: Path, file: FileRecord) -> str:
    """Return what is wrong with a file's size or kind, empty if nothing is."""
    try:
        num_bytes = regular_size(path)
    except UserError as error:
        return _without_path(error, path)
    if num_bytes < file.num_bytes:
        return f"cut short: {num_bytes:,} of {file.num_bytes:,} bytes"
    return f"{num_bytes - file.num_bytes:,} bytes too many" if num_bytes > file.num_bytes else ""


def _file_damage(step_dir: Path, record: ManifestRecord, named: tuple[str, FileRecord]) -> str:
    """Return what is wrong with a file, empty if nothing is."""
    name, file = named
    path = step_dir / name
    what = _size_damage(path, file)
    if what:
        return what
    try:
        found = digest_file(path, kind=file.kind)
    except (UserError, OSError) as error:
        return _without_path(error, path)
    listed = {
        tensor_key(one.name, str(one.section), str(one.entry)): (tuple(one.shape), one.dtype)
        for one in record.tensors
        if one.file == name
    }
    header = _header_damage(path, listed) if listed else ""
    if found != file:
        where = f", its header too: {header}" if header else ", in the tensors' data" if listed else ""
        return f"its content has changed{where} (digest {found.digest}, {file.digest} in the manifest)"
    return header or _digest_damage(path, record, file)


def _digest_damage(path: Path, record: ManifestRecord, file: FileRecord) -> str:
    """Return what is wrong with the digests of a file's tensors, empty if nothing is."""
    tensors = [(listing, listing.crc64nvme) for listing in record.tensors if listing.file == path.name]
    crcs = [(int(crc, 16), prod(one.shape) * NUM_BYTES[one.dtype]) for one, crc in tensors if isinstance(crc, str)]
    if not crcs:
        return ""
    try:
        header = header_bytes(path)
    except (UserError, OSError) as error:
        return _without_path(error, path)
    whole = joined([(crc64nvme(header), len(header)), *crcs])
    return "" if f"{whole:016x}" == file.digest else "its digest in the manifest is not that of its tensors there"


def _header_damage(path: Path, listed: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    try:
        found = {key: (stored.shape, stored.dtype) for key, stored in read_stored(path).items()}
    except (UserError, OSError) as error:
        return _without_path(error, path)
    for key in sorted(found.keys() | listed.keys()):
        if key not in found or key not in listed:
            return f"tensor {key!r} is only in {'the manifest' if key in listed else 'the file'}"
        if found[key] != listed[key]:
            return f"tensor {key!r} differs from the manifest's entry"
    return ""


def _record_damages(step_dir: Path, record: ManifestRecord) -> list[Damage]:
    """Return what is wrong with the JSON files, even where their digests are right."""
    damages = []

    def read_index(section: str) -> None:
        path = step_dir / index_file_name(section)
        files = {
            tensor_key(one.name, section, str(one.entry)): one.file for one in record.tensors if one.section == section
        }
        if path.name in record.files and read_record(path, IndexRecord).weight_map != files:
            raise DamagedCheckpoint(f"{path}: differs from the manifest")

    checks: dict[str, Callable[[], object]] = {
        TRAINER_STATE: lambda: _position(step_dir, record),
        RECIPE: lambda: read_record(step_dir / RECIPE, RecipeRecord),
        **{index_file_name(section): partial(read_index, section) for section in SECTIONS},
    }
    for name, check in checks.items():
        try:
            if name in record.files:
                check()
        except (UserError, OSError) as error:
            damages.append(Damage(file=name, what=_without_path(error, step_dir / name)))
    return damages


def _unlisted(step_dir: Path, files: Mapping[str, FileRecord]) -> tuple[str, ...]:
    try:
        return tuple(name for name in entries(LocalPlace(step_dir), files) if name not in files and name != MANIFEST)
    except UserError:
        return ()


def _without_path(error: Exception, *paths: Path) -> str:
    """Return an error's message without the path that it begins with."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    for path in paths:
        text = text.removeprefix(f"{path}: ")
    return text

"""Save a checkpoint: every rank writes its files into a staging folder, and one rename commits it."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from shardlaunch.checkpoints.files import delete_tree, fsync, is_there
from shardlaunch.checkpoints.gather import gather
from shardlaunch.checkpoints.layout import (
    MANIFEST,
    TRAINER_STATE,
    TensorFile,
    index_file_name,
    is_plain_file_name,
    plan_files,
    step_dir_name,
)
from shardlaunch.checkpoints.manifest import Manifest
from shardlaunch.checkpoints.names import REPLACED_PREFIX as REPLACED_PREFIX
from shardlaunch.checkpoints.names import STAGING_PREFIX as STAGING_PREFIX
from shardlaunch.checkpoints.names import TRASH_PREFIX as TRASH_PREFIX
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.records import Position, to_json
from shardlaunch.checkpoints.state import Fragment, fragments_by_key, specs_by_section
from shardlaunch.checkpoints.tensorfile import FileRecord, TensorWriter, digest_file, write_file
from shardlaunch.errors import UserError


def save(
    checkpoints_dir: Path,
    *,
    position: Position,
    state: Iterable[Fragment],
    export: Callable[[Path], None],
    aliases: Mapping[str, str],
    peers: Peers,
) -> Path:
    """Save `state` as the checkpoint of a position's step and return its folder. All ranks.

    The fragments of all ranks together make up the state: every rank yields the same tensors in the same order. In
    addition, a rank needs memory for two incoming buckets of 16 MiB, and for two outgoing ones per other rank: at most
    32 MiB and 512 MiB, since buckets are smaller with more than 16 ranks.
    `export` writes the other files of a model folder (configuration, tokenizer) on rank 0. A valid checkpoint of the
    same step is kept, unless the evaluation that it lacks has been done since. Raises UserError on all ranks when any
    rank cannot write; then nothing is left behind but what cannot be deleted either, under a name that `sweep` knows.
    """
    target = checkpoints_dir / step_dir_name(position.step)
    fragments = fragments_by_key(state)
    files = plan_files([fragment.spec for fragment in fragments.values()], peers.num_ranks)
    staging = checkpoints_dir / f"{STAGING_PREFIX}{target.name}"
    try:
        if _is_committed(target, position, peers):
            peers.together(lambda: fsync(checkpoints_dir) if peers.rank == 0 else None)
            return target
        peers.together(lambda: _make_staging(staging) if peers.rank == 0 else None)
        records = peers.together(lambda: _write_files(staging, files, fragments, peers))
        everyone = _exchange(files, records, peers)
        peers.together(
            lambda: _commit(staging, target, position, files, everyone, export, aliases) if peers.rank == 0 else None
        )
    except UserError as error:
        if peers.rank == 0:
            with suppress(OSError):
                delete_tree(staging)
        raise UserError(f"the checkpoint of step {position.step} was not saved: {error}") from error
    return target


def _is_committed(target: Path, position: Position, peers: Peers) -> bool:
    """Return whether `target` is a valid checkpoint of this position, with all digests checked. All ranks."""
    exists = peers.together(lambda: peers.rank == 0 and is_there(target))
    if not peers.gather([exists])[0][0]:
        return False
    try:
        saved = open_checkpoint(target, peers=peers).position
    except UserError:
        return False
    return saved.is_evaluation_due <= position.is_evaluation_due


def _make_staging(staging: Path) -> None:
    delete_tree(staging)
    staging.mkdir(parents=True)


def _write_files(
    staging: Path, files: list[TensorFile], fragments: Mapping[str, Fragment], peers: Peers
) -> dict[str, FileRecord]:
    """Gather and write the files that this rank owns. All ranks.

    A rank that cannot write continues to gather, since the others need its data, and raises OSError at the end.
    """
    failure: OSError | None = None
    writing: dict[str, TensorWriter] = {}
    try:
        try:
            for file in files:
                if file.owner == peers.rank:
                    entries = [(spec.key, spec.dtype, spec.shape) for spec in file.specs]
                    writing[file.file_name] = TensorWriter(staging / file.file_name, entries)
        except OSError as error:
            failure = error
        for file, chunks in gather(files, fragments, peers):
            try:
                if failure is None:
                    for chunk in chunks:
                        writing[file.file_name].write(chunk)
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure
        return {name: writer.finish() for name, writer in writing.items()}
    finally:
        for writer in writing.values():
            writer.close()


def _exchange(files: list[TensorFile], records: Mapping[str, FileRecord], peers: Peers) -> dict[str, FileRecord]:
    """Return every file's record on every rank. All ranks. A digest is sent as four 32-bit numbers."""
    numbers = []
    for file in files:
        record = records.get(file.file_name)
        digest = int(record.digest, 16) if record else 0
        numbers += [record.num_bytes if record else 0, *((digest >> shift) & 0xFFFFFFFF for shift in (96, 64, 32, 0))]
    everyone = peers.gather(numbers)
    result = {}
    for position, file in enumerate(files):
        num_bytes, *words = everyone[file.owner][5 * position : 5 * position + 5]
        result[file.file_name] = FileRecord(num_bytes=num_bytes, digest="".join(f"{word:08x}" for word in words))
    return result


def _commit(
    staging: Path,
    target: Path,
    position: Position,
    files: list[TensorFile],
    records: dict[str, FileRecord],
    export: Callable[[Path], None],
    aliases: Mapping[str, str],
) -> None:
    """Complete the staging folder and commit it. Rank 0."""
    export(staging)
    for path in sorted(staging.iterdir()):
        if not is_plain_file_name(path.name):  # as `read_manifest` asks for
            raise UserError(f"export() wrote {path.name!r}: name it with letters, digits and any of _ . + @ - only")
        if path.is_file() and path.name not in records:
            fsync(path)
            records[path.name] = digest_file(path)
    tensors = {spec: file.file_name for file in files for spec in file.specs}
    for section, specs in specs_by_section(tensors).items():
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
            "weight_map": {spec.key: tensors[spec] for spec in specs},
        }
        index_name = index_file_name(section)
        records[index_name] = write_file(staging / index_name, json.dumps(index, indent=1).encode())
    saved = msgspec.to_builtins(position)
    records[TRAINER_STATE] = write_file(staging / TRAINER_STATE, to_json(saved, indent=1))
    manifest = Manifest(step=position.step, files=records, tensors=tensors, aliases=aliases)
    write_file(staging / MANIFEST, manifest.to_json())
    fsync(staging)
    replaced = target.with_name(f"{REPLACED_PREFIX}{target.name}")
    if is_there(target):  # see _is_committed; move it aside, since rename needs a free name
        delete_tree(replaced)
        target.rename(replaced)
    try:
        staging.rename(target)
    except OSError:
        if is_there(replaced):
            replaced.rename(target)
        raise
    fsync(target.parent)
    with suppress(OSError):
        delete_tree(replaced)

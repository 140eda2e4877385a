"""Save a checkpoint: every rank writes its share into the files of a staging folder, and one rename commits it."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from shardlaunch.checkpoints.files import delete_tree, fsync, is_there, naming
from shardlaunch.checkpoints.layout import (
    MANIFEST,
    TRAINER_STATE,
    TensorFile,
    index_file_name,
    is_listed_file_name,
    step_dir_name,
)
from shardlaunch.checkpoints.manifest import Manifest
from shardlaunch.checkpoints.names import ADAPTER_WEIGHTS
from shardlaunch.checkpoints.names import REPLACED_PREFIX as REPLACED_PREFIX
from shardlaunch.checkpoints.names import STAGING_PREFIX as STAGING_PREFIX
from shardlaunch.checkpoints.names import TRASH_PREFIX as TRASH_PREFIX
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.records import Position, to_json
from shardlaunch.checkpoints.shares import Share, Written, write_share
from shardlaunch.checkpoints.state import TensorSpec, specs_by_section
from shardlaunch.checkpoints.tensorfile import digest_file, write_file
from shardlaunch.errors import UserError


def save(
    checkpoints_dir: Path,
    *,
    position: Position,
    share: Share,
    export: Callable[[Path], None],
    aliases: Mapping[str, str],
    peers: Peers,
    on_chunk: Callable[[], None] = lambda: None,
) -> Path:
    """Save a state as the checkpoint of a position's step and return its folder. All ranks.

    The shares of all ranks together make up the state. Each rank writes its own, in chunks of a few MiB, and calls
    `on_chunk` after each; only digests are sent.
    `export` writes the other files of a model folder (configuration, tokenizer) on rank 0. A valid checkpoint of the
    same step is kept, unless the evaluation that it lacks has been done since. Raises UserError on all ranks when any
    rank cannot write; then nothing is left behind but what cannot be deleted either, under a name that `sweep` knows.
    """
    target = checkpoints_dir / step_dir_name(position.step)
    staging = checkpoints_dir / f"{STAGING_PREFIX}{target.name}"
    try:
        if _is_committed(target, position, peers):
            peers.together(lambda: fsync(checkpoints_dir) if peers.rank == 0 else None)
            return target
        peers.together(lambda: _make_staging(staging, share.files) if peers.rank == 0 else None)
        written = peers.together(lambda: write_share(staging, share, with_headers=peers.rank == 0, on_chunk=on_chunk))
        crcs = _crcs(share.specs, written, peers)
        peers.together(
            lambda: _commit(staging, target, position, share.files, crcs, export, aliases) if peers.rank == 0 else None
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
    if not peers.of_first([exists])[0]:
        return False
    try:
        saved = open_checkpoint(target, peers=peers).position
    except UserError:
        return False
    return saved.is_evaluation_due <= position.is_evaluation_due


def _make_staging(staging: Path, files: Sequence[TensorFile]) -> None:
    """Make the staging folder with the files of tensors in it, empty but of their sizes."""
    delete_tree(staging)
    staging.mkdir(parents=True)
    for file in files:
        path = staging / file.file_name
        with open(path, "xb", buffering=0) as made, naming(path):
            made.truncate(file.num_bytes)


def _crcs(specs: Sequence[TensorSpec], written: Written, peers: Peers) -> dict[TensorSpec, int]:
    """Return the CRC of each tensor, of which each rank knows a part. All ranks.

    Raises AssertionError on all ranks if not each element was written once.
    """
    crcs, num_elements = peers.xor(written.crcs), peers.sum(written.num_elements)
    for spec, count in zip(specs, num_elements, strict=True):
        assert count == spec.num_elements, f"{spec.key}: {count} elements written, of {spec.num_elements}"
    return {spec: int(crc) for spec, crc in zip(specs, crcs, strict=True)}


def _commit(
    staging: Path,
    target: Path,
    position: Position,
    files: Sequence[TensorFile],
    crcs: Mapping[TensorSpec, int],
    export: Callable[[Path], None],
    aliases: Mapping[str, str],
) -> None:
    """Complete the staging folder and commit it. Rank 0."""
    records = {file.file_name: file.record(crcs) for file in files}
    export(staging)
    for path in sorted(staging.rglob("*")):
        name = path.relative_to(staging).as_posix()
        if not is_listed_file_name(name):  # as `read_manifest` asks for
            raise UserError(
                f"export() wrote {name!r}: name it with letters, digits and any of _ . + @ - only, and put it at most "
                f"one folder deep"
            )
        if name not in records:
            fsync(path)
            if path.is_file():
                records[name] = digest_file(path)
    tensors = {spec: file.file_name for file in files for spec in file.specs}
    for section, specs in specs_by_section(tensors).items():
        if ADAPTER_WEIGHTS in map(tensors.get, specs):
            continue  # peft reads no index
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
            "weight_map": {spec.key: tensors[spec] for spec in specs},
        }
        index_name = index_file_name(section)
        records[index_name] = write_file(staging / index_name, json.dumps(index, indent=1).encode())
    saved = msgspec.to_builtins(position)
    records[TRAINER_STATE] = write_file(staging / TRAINER_STATE, to_json(saved, indent=1))
    manifest = Manifest(step=position.step, files=records, tensors=tensors, aliases=aliases, crcs=crcs)
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

"""Find, verify and read checkpoints. Nothing is loaded that does not match the manifest."""

import os
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from shardlaunch.checkpoints.files import come_again, is_transient, naming, retried
from shardlaunch.checkpoints.layout import (
    CHECKPOINTS,
    RECIPE,
    TRAINER_STATE,
    index_file_name,
    step_dir_name,
    step_of_dir_name,
)
from shardlaunch.checkpoints.manifest import DamagedCheckpoint, Manifest, read_manifest
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.records import (
    IndexRecord,
    Position,
    RecipeRecord,
    read_position,
    read_record,
    regular_size,
)
from shardlaunch.checkpoints.state import MODEL, OPTIMIZER, TensorSpec
from shardlaunch.checkpoints.tensorfile import FileRecord, TensorEntry, digest_file, read_header, read_range
from shardlaunch.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint folder, read by tensor name and range (a `StateReader`)."""

    step_dir: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    def specs(self) -> Iterable[TensorSpec]:
        """Return the specs of all its tensors."""
        return self.manifest.tensors.keys()

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int) -> torch.Tensor:
        """Read elements [flat_start, flat_end): a flat CPU tensor of the saved dtype."""
        file_name = self.manifest.tensors[spec]
        return read_range(self.step_dir / file_name, self._headers[file_name][spec.key], flat_start, flat_end)

    @property
    def position(self) -> Position:
        """Return the content of trainer_state.json, for the caller to change."""
        return deepcopy(self._position)

    @cached_property
    def _position(self) -> Position:
        return read_position(self.step_dir / TRAINER_STATE, is_first_version=self.manifest.version == 1)

    @cached_property
    def recipe(self) -> RecipeRecord:
        """Return the content of recipe.json. Raises UserError for a checkpoint without it."""
        if RECIPE not in self.manifest.files:
            raise DamagedCheckpoint(f"{self.step_dir}: lists no {RECIPE}, so that its run is not known")
        return read_record(self.step_dir / RECIPE, RecipeRecord)

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorEntry]]:
        return {name: read_header(self.step_dir / name) for name in set(self.manifest.tensors.values())}


def open_checkpoint(step_dir: Path, *, peers: Peers) -> Checkpoint:
    """Verify a checkpoint folder and return its reader. All ranks; the files to digest are divided among them.

    Raises UserError, the same on all ranks, when a file is missing or its size or digest differs.
    """

    def verify() -> Checkpoint:
        checkpoint = _open_unverified(step_dir)
        for position, (name, record) in enumerate(checkpoint.manifest.files.items()):
            if position % peers.num_ranks == peers.rank:
                _verify_content(step_dir / name, record)
        _verify_headers(checkpoint)
        _verify_records(checkpoint)
        return checkpoint

    return peers.together(lambda: retried(verify))


def _open_unverified(step_dir: Path) -> Checkpoint:
    """Return the reader of a checkpoint whose files are there, and have their sizes. Raises UserError for others."""
    manifest = read_manifest(step_dir)
    step = step_of_dir_name(step_dir.name)
    if step not in (None, manifest.step):
        raise DamagedCheckpoint(
            f"{step_dir}: holds step {manifest.step}; is it a copy? Give the folder the name "
            f"{step_dir_name(manifest.step)}, or delete it"
        )
    for name, record in manifest.files.items():  # sizes first: a file without an end has no digest
        num_bytes = regular_size(step_dir / name)
        if num_bytes != record.num_bytes:
            raise DamagedCheckpoint(f"{step_dir / name}: {num_bytes} bytes, but {record.num_bytes} in the manifest")
    return Checkpoint(step_dir=step_dir, manifest=manifest)


def _verify_content(path: Path, record: FileRecord) -> None:
    if digest_file(path) != record:
        raise DamagedCheckpoint(f"{path}: the file is damaged (its digest differs from the manifest's)")


def _verify_headers(checkpoint: Checkpoint) -> None:
    """Check that each file holds exactly the tensors that the manifest lists for it."""
    found = {(name, key): entry for name, header in checkpoint._headers.items() for key, entry in header.items()}
    listed = {(name, spec.key): spec for spec, name in checkpoint.manifest.tensors.items()}
    for place in sorted(found.keys() | listed.keys()):
        name, key = place
        if place not in found or place not in listed:
            where = "the manifest" if place in listed else "the file"
            raise DamagedCheckpoint(f"{checkpoint.step_dir / name}: tensor {key!r} is only in {where}")
        if (found[place].shape, found[place].dtype) != (listed[place].shape, listed[place].dtype):
            raise DamagedCheckpoint(f"{checkpoint.step_dir / name}: tensor {key!r} differs from the manifest's entry")


def _verify_records(checkpoint: Checkpoint) -> None:
    """Check that the JSON files are what their schemas say, and agree with the manifest."""
    manifest, step_dir = checkpoint.manifest, checkpoint.step_dir
    if checkpoint.position.step != manifest.step:
        raise DamagedCheckpoint(
            f"{step_dir / TRAINER_STATE}: is of step {checkpoint.position.step}, the manifest of step {manifest.step}"
        )
    if RECIPE in manifest.files:
        _ = checkpoint.recipe
    for section in (MODEL, OPTIMIZER):
        name = index_file_name(section)
        files = {spec.key: file for spec, file in manifest.tensors.items() if spec.section == section}
        if name in manifest.files and read_record(step_dir / name, IndexRecord).weight_map != files:
            raise DamagedCheckpoint(f"{step_dir / name}: differs from the manifest")


def checkpoint_steps(checkpoints_dir: Path) -> list[int]:
    """Return the steps that have a folder in `checkpoints_dir`, ascending, valid or not. Raises OSError."""
    try:
        with naming(checkpoints_dir), os.scandir(checkpoints_dir) as entries:
            steps = [step_of_dir_name(entry.name) for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(step for step in steps if step is not None)


def shared_steps(checkpoints_dir: Path, *, peers: Peers) -> list[int]:
    """Return the steps that rank 0 finds in `checkpoints_dir`, on every rank. All ranks."""

    def listed() -> list[int]:
        try:
            return retried(lambda: checkpoint_steps(checkpoints_dir))
        except OSError as error:
            raise come_again(error) from error

    return peers.of_first(peers.together(lambda: listed() if peers.rank == 0 else []))


def newest_complete(checkpoints_dir: Path) -> Path | None:
    """Return the newest checkpoint folder that looks complete, None if there is none. No collectives.

    Checks the manifest, the sizes of all files, trainer_state.json and recipe.json, but not the tensors.
    """
    for step in reversed(checkpoint_steps(checkpoints_dir)):
        step_dir = checkpoints_dir / step_dir_name(step)
        try:
            retried(partial(_verify_cheaply, step_dir))
        except UserError:
            continue
        return step_dir
    return None


def _verify_cheaply(step_dir: Path) -> None:
    checkpoint = _open_unverified(step_dir)
    _verify_content(step_dir / TRAINER_STATE, checkpoint.manifest.files[TRAINER_STATE])
    _verify_records(checkpoint)


def position_of(step_dir: Path) -> Position:
    """Return the position of a checkpoint's run. Raises UserError for a damaged one. No collectives."""
    return retried(lambda: _open_unverified(step_dir).position)


def latest_checkpoint(
    step_dirs: Iterable[Path], *, peers: Peers, on_damaged: Callable[[UserError], None]
) -> Checkpoint | None:
    """Return the first valid one of `step_dirs` (newest first); `on_damaged` gets each error before it. All ranks."""
    for step_dir in step_dirs:
        try:
            return open_checkpoint(step_dir, peers=peers)
        except UserError as error:
            on_damaged(error)
    return None


def open_path(path: Path, *, peers: Peers, warn: Callable[[str], None]) -> Checkpoint:
    """Return the checkpoint at a path: a checkpoint folder, or a run folder (its newest valid checkpoint).

    All ranks. Raises UserError with a message that begins with the path.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if step_of_dir_name(path.name) is not None or not (path / CHECKPOINTS).is_dir():
        try:
            return open_checkpoint(path, peers=peers)
        except UserError as error:
            raise UserError(f"{path}: not a valid checkpoint: {error}") from error
    try:
        checkpoint = newest_valid(path / CHECKPOINTS, peers=peers, warn=warn)
    except DamagedCheckpoint as error:
        raise UserError(f"{path}: {error}") from error
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint in this run folder")
    return checkpoint


def newest_valid(checkpoints_dir: Path, *, peers: Peers, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest valid checkpoint, None if there is none; `warn` gets a line for each damaged one. All ranks.

    Raises DamagedCheckpoint when there are checkpoints but all are damaged.
    """
    steps = shared_steps(checkpoints_dir, peers=peers)
    damaged: list[UserError] = []

    def on_damaged(error: UserError) -> None:
        damaged.append(error)
        warn(f"skipped a damaged checkpoint: {error}")

    step_dirs = [checkpoints_dir / step_dir_name(step) for step in reversed(steps)]
    checkpoint = latest_checkpoint(step_dirs, peers=peers, on_damaged=on_damaged)
    if checkpoint is None and any(map(is_transient, damaged)):
        raise come_again(next(filter(is_transient, damaged)))
    if checkpoint is None and damaged:
        raise DamagedCheckpoint(f"no valid checkpoint in {checkpoints_dir} ({damaged[0]})")
    return checkpoint

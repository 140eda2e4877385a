"""Find, verify and read checkpoints. Nothing is loaded that does not match the manifest."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from json import loads
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.layout import CHECKPOINTS, TRAINER_STATE, step_dir_name, step_of_dir_name
from shardlaunch.checkpoints.manifest import DamagedCheckpoint, Manifest, read_manifest
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.state import TensorSpec
from shardlaunch.checkpoints.tensorfile import TensorEntry, digest_file, read_header, read_range
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

    def read_json(self, file_name: str) -> Any:
        """Return the content of one of its JSON files."""
        return loads((self.step_dir / file_name).read_bytes())

    @property
    def trainer_state(self) -> dict[str, Any]:
        """Return the content of trainer_state.json."""
        state: dict[str, Any] = self.read_json(TRAINER_STATE)
        return state

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorEntry]]:
        return {name: read_header(self.step_dir / name) for name in set(self.manifest.tensors.values())}


def open_checkpoint(step_dir: Path, *, peers: Peers) -> Checkpoint:
    """Verify a checkpoint folder and return its reader. All ranks; the files to digest are divided among them.

    Raises UserError, the same on all ranks, when a file is missing or its size or digest differs.
    """

    def verify() -> Checkpoint:
        manifest = read_manifest(step_dir)
        for position, (name, record) in enumerate(manifest.files.items()):
            if position % peers.num_ranks == peers.rank:
                _verify_file(step_dir / name, record.num_bytes, record.digest)
        checkpoint = Checkpoint(step_dir=step_dir, manifest=manifest)
        _verify_headers(checkpoint)
        return checkpoint

    return peers.together(verify)


def _verify_file(path: Path, num_bytes: int, digest: str) -> None:
    try:
        found = digest_file(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    if found.num_bytes != num_bytes:
        raise DamagedCheckpoint(f"{path}: {found.num_bytes} bytes, but {num_bytes} in the manifest")
    if found.digest != digest:
        raise DamagedCheckpoint(f"{path}: the file is damaged (its digest differs from the manifest's)")


def _verify_headers(checkpoint: Checkpoint) -> None:
    """Check that the files hold exactly the tensors that the manifest lists."""
    try:
        found = {key: entry for header in checkpoint._headers.values() for key, entry in header.items()}
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{checkpoint.step_dir}: {error}") from error
    listed = {spec.key: spec for spec in checkpoint.manifest.tensors}
    for key in sorted(found.keys() | listed.keys()):
        if key not in found or key not in listed:
            where = "the manifest" if key in listed else "a file"
            raise DamagedCheckpoint(f"{checkpoint.step_dir}: tensor {key!r} is only in {where}")
        if (found[key].shape, found[key].dtype) != (listed[key].shape, listed[key].dtype):
            raise DamagedCheckpoint(f"{checkpoint.step_dir}: tensor {key!r} differs from the manifest's entry")


def checkpoint_steps(checkpoints_dir: Path) -> list[int]:
    """Return the steps that have a folder in `checkpoints_dir`, ascending, valid or not."""
    if not checkpoints_dir.is_dir():
        return []
    steps = (step_of_dir_name(path.name) for path in checkpoints_dir.iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None)


def newest_complete(checkpoints_dir: Path) -> Path | None:
    """Return the newest checkpoint folder that looks complete, None if there is none. No collectives.

    Checks the manifest, the sizes of all files and the digest of trainer_state.json, but not the tensors' digests.
    """
    for step in reversed(checkpoint_steps(checkpoints_dir)):
        step_dir = checkpoints_dir / step_dir_name(step)
        try:
            files = read_manifest(step_dir).files
            if any((step_dir / name).lstat().st_size != record.num_bytes for name, record in files.items()):
                continue
            _verify_file(step_dir / TRAINER_STATE, files[TRAINER_STATE].num_bytes, files[TRAINER_STATE].digest)
        except (UserError, OSError, KeyError):
            continue
        return step_dir
    return None


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
    steps = checkpoint_steps(checkpoints_dir)
    damaged: list[str] = []

    def on_damaged(error: UserError) -> None:
        damaged.append(str(error))
        warn(f"skipped a damaged checkpoint: {error}")

    step_dirs = [checkpoints_dir / step_dir_name(step) for step in reversed(steps)]
    checkpoint = latest_checkpoint(step_dirs, peers=peers, on_damaged=on_damaged)
    if checkpoint is None and damaged:
        raise DamagedCheckpoint(f"no valid checkpoint in {checkpoints_dir} ({damaged[0]})")
    return checkpoint

"""Find, verify and read checkpoints. Nothing is loaded that does not match the manifest."""

import os
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from operator import xor
from pathlib import Path

import numpy as np
import torch

from shardlaunch.checkpoints.digests import shifted
from shardlaunch.checkpoints.files import come_again, is_transient, naming, retried
from shardlaunch.checkpoints.layout import (
    CHECKPOINTS,
    RECIPE,
    TRAINER_STATE,
    TensorFile,
    index_file_name,
    step_dir_name,
    step_of_dir_name,
)
from shardlaunch.checkpoints.manifest import DamagedCheckpoint, Manifest, read_manifest
from shardlaunch.checkpoints.names import SECTIONS
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.records import (
    IndexRecord,
    Position,
    RecipeRecord,
    read_position,
    read_record,
    regular_size,
)
from shardlaunch.checkpoints.state import ONLY, Replica, TensorSpec
from shardlaunch.checkpoints.tensorfile import (
    BYTES_PER_ELEMENT,
    FileRecord,
    TensorEntry,
    digest_file,
    read_header,
    read_range_into,
)
from shardlaunch.errors import UserError


@dataclass(kw_only=True)
class _Reads:
    """What a rank has read of a tensor: CRCs of the whole of it, its part in the CRC of replicas, and how much."""

    whole: set[int] = field(default_factory=set)
    crc: int = 0
    num_elements: int = 0

    def add(self, spec: TensorSpec, start: int, end: int, replica: Replica, crc: int) -> None:
        if (start, end) == (0, spec.num_elements):
            self.whole.add(crc)
            return
        num_after = (spec.num_elements - end) * BYTES_PER_ELEMENT[spec.dtype]
        # Equal parts would cancel each other out: each replica counts as if as many bytes more followed it.
        self.crc ^= shifted(crc, num_after + replica.number)
        self.num_elements += end - start


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder, read by tensor name and range (a `StateReader`).

    Records are verified; tensors as well, unless `open_checkpoint` has left that to `verify_read`.
    """

    step_dir: Path
    manifest: Manifest
    _reads: dict[TensorSpec, _Reads] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.manifest.step

    def specs(self) -> Iterable[TensorSpec]:
        """Return the specs of all its tensors."""
        return self.manifest.tensors.keys()

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int, replica: Replica = ONLY) -> torch.Tensor:
        """Read elements [flat_start, flat_end): a flat CPU tensor of the saved dtype.

        `replica` says which one this range is of equal ones that several ranks read.
        """
        flat = torch.empty(flat_end - flat_start, dtype=spec.dtype)
        self.read_into(spec, flat_start, flat, replica)
        return flat

    def read_into(self, spec: TensorSpec, flat_start: int, target: torch.Tensor, replica: Replica = ONLY) -> None:
        """Read elements from `flat_start` on into a contiguous CPU tensor of the saved dtype."""
        entry = TensorEntry(shape=spec.shape, dtype=spec.dtype, offset=self._offsets[spec])
        crc = read_range_into(self.step_dir / self.manifest.tensors[spec], entry, flat_start, target)
        if spec in self.manifest.crcs:
            flat_end = flat_start + target.numel()
            self._reads.setdefault(spec, _Reads()).add(spec, flat_start, flat_end, replica, crc)

    def verify_read(self, peers: Peers) -> None:
        """Check what was read since the checkpoint was opened: all ranks' parts of a tensor together. All ranks.

        Raises DamagedCheckpoint on all ranks. Raises AssertionError where ranks have not read all parts of a replica.
        """
        specs = list(self.manifest.crcs)
        mine = [self._reads.get(spec, _Reads()) for spec in specs]
        crcs = peers.xor(np.array([reads.crc for reads in mine], dtype=np.uint64))
        counts = peers.sum(np.array([reads.num_elements for reads in mine], dtype=np.int64))
        self._reads.clear()

        def check() -> None:
            for spec, reads, crc, count in zip(specs, mine, crcs, counts, strict=True):
                saved = self.manifest.crcs[spec]
                num_replicas, rest = divmod(int(count), spec.num_elements or 1)
                assert not rest, f"{spec.key}: {count} elements read, of {spec.num_elements}"
                expected = reduce(xor, (shifted(saved, index) for index in range(num_replicas)), 0)
                if int(crc) != expected or not reads.whole <= {saved}:
                    path = self.step_dir / self.manifest.tensors[spec]
                    raise DamagedCheckpoint(f"{path}: the file is damaged (the digest of {spec.key} differs)")

        try:
            peers.together(check)
        except UserError as error:
            raise DamagedCheckpoint(str(error)) from error

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
    def _files(self) -> dict[str, TensorFile]:
        """Return the files of tensors by name, with the tensors in the manifest's order, which is that in the file."""
        specs: dict[str, list[TensorSpec]] = {}
        for spec, name in self.manifest.tensors.items():
            specs.setdefault(name, []).append(spec)
        return {name: TensorFile(file_name=name, specs=tuple(its_specs)) for name, its_specs in specs.items()}

    @cached_property
    def _offsets(self) -> dict[TensorSpec, int]:
        if self.manifest.version >= 4:
            return {spec: offset for file in self._files.values() for spec, offset in file.offsets()}
        headers = {name: read_header(self.step_dir / name) for name in self._files}
        return {spec: headers[name][spec.key].offset for spec, name in self.manifest.tensors.items()}


def open_checkpoint(step_dir: Path, *, peers: Peers, checks_tensors: bool = True) -> Checkpoint:
    """Verify a checkpoint folder and return its reader. All ranks; the files are divided among them.

    Without `checks_tensors` the values of tensors are left to `Checkpoint.verify_read`, where the manifest has a digest
    of each. Raises UserError, the same on all ranks, when a file is missing or its size or digest differs.
    """

    def verify() -> Checkpoint:
        checkpoint = _open_unverified(step_dir, share=slice(peers.rank, None, peers.num_ranks))
        left_out = checkpoint._files if checkpoint.manifest.crcs and not checks_tensors else {}
        for name, record in list(checkpoint.manifest.files.items())[peers.rank :: peers.num_ranks]:
            if name not in left_out:
                _verify_content(step_dir / name, record)
        for file in list(checkpoint._files.values())[peers.rank :: peers.num_ranks]:
            _verify_header(step_dir / file.file_name, file, checkpoint.manifest)
        _verify_records(checkpoint)
        return checkpoint

    return peers.together(lambda: retried(verify))


def _open_unverified(step_dir: Path, *, share: slice = slice(None)) -> Checkpoint:
    """Return the reader of a checkpoint whose files, or a share, have their sizes. Raises UserError for others."""
    manifest = read_manifest(step_dir)
    step = step_of_dir_name(step_dir.name)
    if step not in (None, manifest.step):
        raise DamagedCheckpoint(
            f"{step_dir}: holds step {manifest.step}; is it a copy? Give the folder the name "
            f"{step_dir_name(manifest.step)}, or delete it"
        )
    for name, record in list(manifest.files.items())[share]:  # sizes first: a file without an end has no digest
        num_bytes = regular_size(step_dir / name)
        if num_bytes != record.num_bytes:
            raise DamagedCheckpoint(f"{step_dir / name}: {num_bytes} bytes, but {record.num_bytes} in the manifest")
    return Checkpoint(step_dir=step_dir, manifest=manifest)


def _verify_content(path: Path, record: FileRecord) -> None:
    if digest_file(path, kind=record.kind) != record:
        raise DamagedCheckpoint(f"{path}: the file is damaged (its digest differs from the manifest's)")


def _verify_header(path: Path, file: TensorFile, manifest: Manifest) -> None:
    """Check that a file holds exactly the tensors that the manifest lists for it, and that these make up its digest."""
    found = read_header(path)
    listed = {spec.key: (spec, offset) for spec, offset in file.offsets()}
    for key in sorted(found.keys() | listed.keys()):
        if key not in found or key not in listed:
            where = "the manifest" if key in listed else "the file"
            raise DamagedCheckpoint(f"{path}: tensor {key!r} is only in {where}")
        entry, (spec, offset) = found[key], listed[key]
        if (entry.shape, entry.dtype) != (spec.shape, spec.dtype) or (manifest.crcs and entry.offset != offset):
            raise DamagedCheckpoint(f"{path}: tensor {key!r} differs from the manifest's entry")
    if manifest.crcs and file.record(manifest.crcs) != manifest.files[file.file_name]:
        raise DamagedCheckpoint(f"{path}: its digest in the manifest is not that of its tensors there")


def _verify_records(checkpoint: Checkpoint) -> None:
    """Check that the JSON files are what their schemas say, and agree with the manifest."""
    manifest, step_dir = checkpoint.manifest, checkpoint.step_dir
    if checkpoint.position.step != manifest.step:
        raise DamagedCheckpoint(
            f"{step_dir / TRAINER_STATE}: is of step {checkpoint.position.step}, the manifest of step {manifest.step}"
        )
    if RECIPE in manifest.files:
        _ = checkpoint.recipe
    for section in SECTIONS:
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
    step_dirs: Iterable[Path],
    *,
    peers: Peers,
    on_damaged: Callable[[UserError], None],
    checks_tensors: bool = True,
) -> Checkpoint | None:
    """Return the first valid one of `step_dirs` (newest first); `on_damaged` gets each error before it. All ranks."""
    for step_dir in step_dirs:
        try:
            return open_checkpoint(step_dir, peers=peers, checks_tensors=checks_tensors)
        except UserError as error:
            on_damaged(error)
    return None


def open_path(path: Path, *, peers: Peers, warn: Callable[[str], None], checks_tensors: bool = True) -> Checkpoint:
    """Return the checkpoint at a path: a checkpoint folder, or a run folder (its newest valid checkpoint).

    All ranks. Raises UserError with a message that begins with the path.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if step_of_dir_name(path.name) is not None or not (path / CHECKPOINTS).is_dir():
        try:
            return open_checkpoint(path, peers=peers, checks_tensors=checks_tensors)
        except UserError as error:
            raise UserError(f"{path}: not a valid checkpoint: {error}") from error
    try:
        checkpoint = newest_valid(path / CHECKPOINTS, peers=peers, warn=warn, checks_tensors=checks_tensors)
    except DamagedCheckpoint as error:
        raise UserError(f"{path}: {error}") from error
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint in this run folder")
    return checkpoint


def newest_valid(
    checkpoints_dir: Path, *, peers: Peers, warn: Callable[[str], None], checks_tensors: bool = True
) -> Checkpoint | None:
    """Return the newest valid checkpoint, None if there is none; `warn` gets a line for each damaged one. All ranks.

    Raises DamagedCheckpoint when there are checkpoints but all are damaged.
    """
    steps = shared_steps(checkpoints_dir, peers=peers)
    damaged: list[UserError] = []

    def on_damaged(error: UserError) -> None:
        damaged.append(error)
        warn(f"skipped a damaged checkpoint: {error}")

    step_dirs = [checkpoints_dir / step_dir_name(step) for step in reversed(steps)]
    checkpoint = latest_checkpoint(step_dirs, peers=peers, on_damaged=on_damaged, checks_tensors=checks_tensors)
    if checkpoint is None and any(map(is_transient, damaged)):
        raise come_again(next(filter(is_transient, damaged)))
    if checkpoint is None and damaged:
        raise DamagedCheckpoint(f"no valid checkpoint in {checkpoints_dir} ({damaged[0]})")
    return checkpoint

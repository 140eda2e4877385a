"""The manifest: the contents of a committed checkpoint. A folder without a valid manifest is not a checkpoint."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shardlaunch.checkpoints.files import is_there
from shardlaunch.checkpoints.layout import MANIFEST, TRAINER_STATE, is_plain_file_name
from shardlaunch.checkpoints.records import ManifestHead, ManifestRecord, TensorListing, decode, read_bytes
from shardlaunch.checkpoints.state import MODEL, OPTIMIZER, TensorSpec
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES, DTYPES, FileRecord
from shardlaunch.errors import UserError

FORMAT = "shardlaunch-checkpoint"
VERSION = 3  # version 2 had no `num_tensors`; version 1 `kind` (`weight` or the optimizer's) for section and entry


class DamagedCheckpoint(UserError):
    """Raised for a checkpoint whose files are missing, damaged or inconsistent."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's files with size and digest, and its tensors with shape, dtype and file.

    `aliases` maps the other names of tied weights to the one under which the tensor is saved.
    """

    step: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[TensorSpec, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> bytes:
        """Return the manifest as JSON, with a digest of itself at the end."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {
                name: {"bytes": record.num_bytes, "xxh3_128": record.digest} for name, record in self.files.items()
            },
            "tensors": [
                {
                    "name": spec.name,
                    "section": spec.section,
                    "entry": spec.entry,
                    "shape": list(spec.shape),
                    "dtype": DTYPE_NAMES[spec.dtype],
                    "file": file_name,
                }
                for spec, file_name in self.tensors.items()
            ],
            "num_tensors": Counter(spec.section for spec in self.tensors),
            "aliases": dict(self.aliases),
        }
        return json.dumps({**body, "xxh3_128": _digest(body)}, indent=1).encode()


def read_manifest(step_dir: Path) -> Manifest:
    """Read and check the manifest of a checkpoint. Raises UserError when it is missing or not valid."""
    path = step_dir / MANIFEST
    try:
        is_missing = not is_there(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    if is_missing:
        raise DamagedCheckpoint(f"{step_dir}: no {MANIFEST}, so this is not a checkpoint")
    data = read_bytes(path)
    head = decode(path, data, ManifestHead)
    if head.format != FORMAT or not 1 <= head.version <= VERSION:
        raise DamagedCheckpoint(
            f"{path}: {head.format} version {head.version} is not supported; this release reads {FORMAT} versions 1 to "
            f"{VERSION}"
        )
    record = decode(path, data, ManifestRecord)
    body = msgspec.to_builtins(record)
    if body.pop("xxh3_128") != _digest(body):
        raise DamagedCheckpoint(f"{path}: the manifest does not match its own digest")
    try:
        return _checked(record)
    except (ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error


def _checked(record: ManifestRecord) -> Manifest:
    """Return a manifest whose parts agree. Raises ValueError that says which do not."""
    for name in record.files:
        if not is_plain_file_name(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is not a plain file name")
    tensors: dict[TensorSpec, str] = {}
    for listing in record.tensors:
        if listing.file not in record.files:
            raise ValueError(f"tensor {listing.name!r} is in {listing.file!r}, which is not among the files")
        tensors[_spec(listing, record.version)] = listing.file
    if len({spec.key for spec in tensors}) < len(record.tensors):
        raise ValueError("a tensor is listed twice")
    if record.version >= 3 and Counter(spec.section for spec in tensors) != record.num_tensors:
        raise ValueError(f"lists other tensors than the {record.num_tensors} that were saved")
    if TRAINER_STATE not in record.files:
        raise ValueError(f"lists no {TRAINER_STATE}")
    names = {spec.name for spec in tensors if spec.section == MODEL}
    for alias, name in record.aliases.items():
        if name not in names or alias in names:
            raise ValueError(f"{alias!r} cannot be another name of {name!r}")
    return Manifest(
        step=record.step,
        files={name: FileRecord(num_bytes=entry.bytes, digest=entry.xxh3_128) for name, entry in record.files.items()},
        tensors=tensors,
        aliases=record.aliases,
        version=record.version,
    )


def _spec(tensor: TensorListing, version: int) -> TensorSpec:
    section: object = tensor.section
    entry, kind = tensor.entry, tensor.kind
    if version == 1 and isinstance(kind, str):
        section, entry = (MODEL, "") if kind == "weight" else (OPTIMIZER, kind)
    if not isinstance(section, str) or not isinstance(entry, str) or (version > 1) is isinstance(kind, str):
        raise ValueError(f"tensor {tensor.name!r} has not the fields of version {version}")
    if (section == MODEL) is bool(entry) or tensor.dtype not in DTYPES:
        raise ValueError(f"tensor {tensor.name!r} has an unknown entry or dtype: {entry!r}, {tensor.dtype!r}")
    shape, dtype = tuple(tensor.shape), DTYPES[tensor.dtype]
    return TensorSpec(name=tensor.name, section=section, entry=entry, shape=shape, dtype=dtype)


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())

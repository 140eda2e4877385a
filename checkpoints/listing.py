"""The manifest as it stands in a file: read, and checked by names and numbers alone. Imports no torch."""

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import msgspec
import xxhash
from msgspec import UNSET

from shardlaunch.checkpoints.digests import CRC64, XXH3, FileRecord, digests_of_crcs
from shardlaunch.checkpoints.files import is_there
from shardlaunch.checkpoints.names import EMA, MANIFEST, MODEL, NUM_BYTES, OPTIMIZER, TRAINER_STATE, is_listed_file_name
from shardlaunch.checkpoints.records import FileEntry, ManifestHead, ManifestRecord, TensorListing, decode, read_bytes
from shardlaunch.errors import UserError

FORMAT = "shardlaunch-checkpoint"
VERSION = 4
"""Version 3 had xxh3-128 digests of whole files only; version 2 no `num_tensors` either; version 1 `kind` (`weight` or
the optimizer's) for section and entry."""


class DamagedCheckpoint(UserError):
    """Raised for a checkpoint whose files are missing, damaged or inconsistent."""


def read_listing(step_dir: Path) -> ManifestRecord:
    """Read and check the manifest of a checkpoint. Raises UserError when it is missing or not valid."""
    path = step_dir / MANIFEST
    try:
        is_missing = not is_there(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    if is_missing:
        raise DamagedCheckpoint(f"{step_dir}: no {MANIFEST}, so this is not a checkpoint")
    return listing_of(path, read_bytes(path))


def listing_of(path: Path | str, data: bytes) -> ManifestRecord:
    """Return the manifest in `data`, of which every tensor has section and entry. Raises UserError that names `path`.

    Its files have plain names, its tensors are in its files, and its parts agree with each other.
    """
    head = decode(path, data, ManifestHead)
    if head.format != FORMAT or not 1 <= head.version <= VERSION:
        raise DamagedCheckpoint(
            f"{path}: {head.format} version {head.version} is not supported; this release reads {FORMAT} versions 1 to "
            f"{VERSION}"
        )
    record = decode(path, data, ManifestRecord)
    body = msgspec.to_builtins(record)
    if body.pop("xxh3_128") != body_digest(body):
        raise DamagedCheckpoint(f"{path}: the manifest does not match its own digest")
    try:
        _check(record)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    return record


def file_records(record: ManifestRecord) -> dict[str, FileRecord]:
    """Return size and digest of each file of a manifest, by name."""
    return {name: _file_record(entry) for name, entry in record.files.items()}


def _file_record(entry: FileEntry) -> FileRecord:
    if isinstance(entry.crc64nvme, str):
        return FileRecord(num_bytes=entry.bytes, digest=entry.crc64nvme, kind=CRC64)
    return FileRecord(num_bytes=entry.bytes, digest=str(entry.xxh3_128), kind=XXH3)


def body_digest(body: Mapping[str, Any]) -> str:
    """Return the digest that a manifest has of all that it says."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def listed_digests(record: ManifestRecord) -> dict[str, str]:
    """Return the digests of a checkpoint's weights, optimizer and average, by their names in metrics.jsonl.

    Those that its run has recorded of its step, if it has. None before version 4 of the manifest.
    """
    return digests_of_crcs(
        (str(one.section), tensor_key(one.name, str(one.section), str(one.entry)), int(one.crc64nvme, 16), _bytes(one))
        for one in record.tensors
        if isinstance(one.crc64nvme, str)
    )


def _bytes(tensor: TensorListing) -> int:
    return prod(tensor.shape) * NUM_BYTES[tensor.dtype]


def tensor_key(name: str, section: str, entry: str) -> str:
    """Return a tensor's name in its file: `name` in the model section, `entry/name` in all others."""
    return name if section == MODEL else f"{entry or section}/{name}"


def _check(record: ManifestRecord) -> None:
    """Check that the parts of a manifest agree. Raises ValueError that says which do not."""
    has_crcs = record.version >= 4
    for name, entry in record.files.items():
        if not is_listed_file_name(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is not a plain file name")
        if (entry.crc64nvme is not UNSET, entry.xxh3_128 is not UNSET) != (has_crcs, not has_crcs):
            raise ValueError(f"{name!r} has not the digest of version {record.version}")
    keys = set()
    sections: Counter[str] = Counter()
    for listing in record.tensors:
        if listing.file not in record.files:
            raise ValueError(f"tensor {listing.name!r} is in {listing.file!r}, which is not among the files")
        if (listing.crc64nvme is not UNSET) != has_crcs:
            raise ValueError(f"tensor {listing.name!r} has not the digest of version {record.version}")
        section, part = _place(listing, record.version)
        listing.section, listing.entry, listing.kind = section, part, UNSET
        keys.add(tensor_key(listing.name, section, part))
        sections[section] += 1
    if len(keys) < len(record.tensors):
        raise ValueError("a tensor is listed twice")
    if record.version >= 3 and sections != record.num_tensors:
        raise ValueError(f"lists other tensors than the {record.num_tensors} that were saved")
    if TRAINER_STATE not in record.files:
        raise ValueError(f"lists no {TRAINER_STATE}")
    names = {listing.name for listing in record.tensors if listing.section == MODEL}
    for alias, name in record.aliases.items():
        if name not in names or alias in names:
            raise ValueError(f"{alias!r} cannot be another name of {name!r}")


def _place(tensor: TensorListing, version: int) -> tuple[Literal["model", "optimizer", "ema"], str]:
    """Return a tensor's section and entry. Raises ValueError for one that has none, or of an unknown dtype."""
    section: object = tensor.section
    entry, kind = tensor.entry, tensor.kind
    if version == 1 and isinstance(kind, str):
        section, entry = (MODEL, "") if kind == "weight" else (OPTIMIZER, kind)
    if not isinstance(section, str) or not isinstance(entry, str) or (version > 1) is isinstance(kind, str):
        raise ValueError(f"tensor {tensor.name!r} has not the fields of version {version}")
    if (section == OPTIMIZER) is not bool(entry) or tensor.dtype not in NUM_BYTES:
        raise ValueError(f"tensor {tensor.name!r} has an unknown entry or dtype: {entry!r}, {tensor.dtype!r}")
    if section == EMA and version < 4:
        raise ValueError(f"tensor {tensor.name!r} is in a section that version {version} does not have")
    return ("model" if section == MODEL else "ema" if section == EMA else "optimizer"), entry

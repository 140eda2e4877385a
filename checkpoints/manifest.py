"""The manifest: the contents of a committed checkpoint. A folder without a valid manifest is not a checkpoint."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardlaunch.checkpoints.digests import FileRecord
from shardlaunch.checkpoints.listing import FORMAT, VERSION, body_digest, file_records, read_listing
from shardlaunch.checkpoints.listing import DamagedCheckpoint as DamagedCheckpoint
from shardlaunch.checkpoints.records import TensorListing
from shardlaunch.checkpoints.state import TensorSpec
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES, DTYPES

MOST_INDENTED = 10_000
"""Tensors of a manifest that is written for people to read too; a longer one is a fifth shorter without."""


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
    crcs: Mapping[TensorSpec, int] = field(default_factory=dict)
    """CRC-64/NVME of each tensor, since version 4."""

    def to_json(self) -> bytes:
        """Return the manifest as JSON, with a digest of itself at the end."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {
                name: {"bytes": record.num_bytes, record.kind: record.digest} for name, record in self.files.items()
            },
            "tensors": [
                {
                    "name": spec.name,
                    "section": spec.section,
                    "entry": spec.entry,
                    "shape": list(spec.shape),
                    "dtype": DTYPE_NAMES[spec.dtype],
                    "file": file_name,
                    "crc64nvme": f"{self.crcs[spec]:016x}",
                }
                for spec, file_name in self.tensors.items()
            ],
            "num_tensors": Counter(spec.section for spec in self.tensors),
            "aliases": dict(self.aliases),
        }
        indent = 1 if len(self.tensors) <= MOST_INDENTED else None
        return json.dumps({**body, "xxh3_128": body_digest(body)}, indent=indent).encode()


def read_manifest(step_dir: Path) -> Manifest:
    """Read and check the manifest of a checkpoint. Raises UserError when it is missing or not valid."""
    record = read_listing(step_dir)
    specs = [_spec(listing) for listing in record.tensors]
    return Manifest(
        step=record.step,
        files=file_records(record),
        tensors={spec: listing.file for spec, listing in zip(specs, record.tensors, strict=True)},
        aliases=record.aliases,
        version=record.version,
        crcs={
            spec: int(listing.crc64nvme, 16)
            for spec, listing in zip(specs, record.tensors, strict=True)
            if isinstance(listing.crc64nvme, str)
        },
    )


def _spec(tensor: TensorListing) -> TensorSpec:
    return TensorSpec(
        name=tensor.name,
        section=str(tensor.section),
        entry=str(tensor.entry),
        shape=tuple(tensor.shape),
        dtype=DTYPES[tensor.dtype],
    )

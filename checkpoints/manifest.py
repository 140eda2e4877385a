"""The manifest: the contents of a committed checkpoint. A folder without a valid manifest is not a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from shardlaunch.checkpoints.layout import MANIFEST, is_plain_file_name
from shardlaunch.checkpoints.state import MODEL, OPTIMIZER, TensorSpec
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES, DTYPES, FileRecord
from shardlaunch.errors import UserError

FORMAT = "shardlaunch-checkpoint"
VERSION = 2  # version 1 had `kind` (`weight` or the optimizer's entry) instead of section and entry


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
            "aliases": dict(self.aliases),
        }
        return json.dumps({**body, "xxh3_128": _digest(body)}, indent=1).encode()


def read_manifest(step_dir: Path) -> Manifest:
    """Read and check the manifest of a checkpoint. Raises DamagedCheckpoint when it is missing or not valid."""
    path = step_dir / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("xxh3_128")
        name, version = body["format"], body["version"]
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{step_dir}: no {MANIFEST}, so this is not a checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: not a readable manifest ({error})") from error
    if name != FORMAT or version not in (1, VERSION):
        raise DamagedCheckpoint(
            f"{path}: {name} version {version} is not supported; this release reads {FORMAT} versions 1 to {VERSION}"
        )
    if digest != _digest(body):
        raise DamagedCheckpoint(f"{path}: the manifest does not match its own digest")
    for name in [*body["files"], *(tensor["file"] for tensor in body["tensors"])]:
        if not is_plain_file_name(name):
            raise DamagedCheckpoint(f"{path}: {name!r} is not a plain file name")
    return Manifest(
        step=body["step"],
        files={
            name: FileRecord(num_bytes=record["bytes"], digest=record["xxh3_128"])
            for name, record in body["files"].items()
        },
        tensors={_spec(tensor, version): tensor["file"] for tensor in body["tensors"]},
        aliases=body["aliases"],
    )


def _spec(tensor: Mapping[str, Any], version: int) -> TensorSpec:
    if version == 1:
        section, entry = (MODEL, "") if tensor["kind"] == "weight" else (OPTIMIZER, tensor["kind"])
    else:
        section, entry = tensor["section"], tensor["entry"]
    shape, dtype = tuple(tensor["shape"]), DTYPES[tensor["dtype"]]
    return TensorSpec(name=tensor["name"], section=section, entry=entry, shape=shape, dtype=dtype)


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())

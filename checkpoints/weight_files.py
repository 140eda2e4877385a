"""Weights in safetensors files: of a checkpoint, a run, or another tool's folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from shardlaunch.checkpoints.digests import XXH3
from shardlaunch.checkpoints.layout import CHECKPOINTS, MANIFEST, index_file_name, is_plain_file_name
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_path
from shardlaunch.checkpoints.records import IndexRecord, decode, open_regular, read_bytes
from shardlaunch.checkpoints.state import MODEL
from shardlaunch.checkpoints.tensorfile import digest_file
from shardlaunch.errors import UserError, some

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Tensors by name in safetensors files."""

    source: Path
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _file_of: dict[str, Path] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU, in its stored dtype."""
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(name)
        return tensor

    def digest(self) -> str:
        """Return a digest of the files' contents, independent of their names."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(digest_file(file, kind=XXH3, follows_links=True).digest.encode())
        return digest.hexdigest()


def open_weights(path: Path, *, warn: Callable[[str], None]) -> WeightFiles:
    """Return the weights at a path: a safetensors file, a checkpoint, a run (its newest valid checkpoint), or a folder
    with model*.safetensors files.

    Only files that the manifest of a checkpoint or the index of a folder lists are read; a checkpoint's digests are
    verified. No collectives. Raises UserError that begins with the path.
    """
    from safetensors import SafetensorError, safe_open

    path = path.expanduser()
    index: Mapping[str, str] = {}
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        files, index = _files_of_folder(path, warn=warn)
    else:
        files = [path]
    weights = WeightFiles(source=path, files=tuple(files))
    for file in files:
        open_regular(file, follows_links=True).close()  # what comes next would wait for a pipe
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    if name in weights._file_of:
                        raise UserError(f"{path}: tensor {name} is in {weights._file_of[name].name} and in {file.name}")
                    weights._file_of[name] = file
                    weights.shapes[name] = tuple(stored.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}){_hint(file)}") from error
    for name, file_name in index.items():
        if weights._file_of.get(name) != path / file_name:
            raise UserError(f"{path / index_file_name(MODEL)}: says that {name} is in {file_name}, but it is not there")
    return weights


def _files_of_folder(path: Path, *, warn: Callable[[str], None]) -> tuple[list[Path], Mapping[str, str]]:
    """Return the files with the weights of a folder, and which tensor its index, if it has one, says is where."""
    if (path / MANIFEST).exists() or (path / CHECKPOINTS).is_dir():
        checkpoint = open_path(path, peers=Peers(), warn=warn)
        tensors = checkpoint.manifest.tensors
        names = sorted({file for spec, file in tensors.items() if spec.section == MODEL})
        return [checkpoint.step_dir / name for name in names], {}
    index = path / index_file_name(MODEL)
    if index.exists():
        weight_map = decode(index, read_bytes(index, follows_links=True), IndexRecord).weight_map
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if not is_plain_file_name(name)]
        if outside:
            raise UserError(f"{index}: {outside[0]!r} is not a plain file name")
        unlisted = sorted(file.name for file in path.glob("model*.safetensors") if file.name not in names)
        if unlisted:
            warn(f"{path}: {some(unlisted)} not read, because {index.name} does not list it")
        return [path / name for name in names], weight_map
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [file.name for pattern in _PICKLES for file in path.glob(pattern)]
        found = f"; {pickles[0]} is a pickle, which is never loaded{_hint(path / pickles[0])}" if pickles else ""
        folds = sorted(str(fold) for fold in path.glob("fold-*") if (fold / CHECKPOINTS).is_dir())
        found = f"; it is a cross-validation: choose a fold, such as {folds[0]}" if folds else found
        raise UserError(f"{path}: no model*.safetensors file in this folder{found}")
    return files, {}


def _hint(file: Path) -> str:
    """Return how to convert a pickle; empty for other files."""
    if not any(file.match(pattern) for pattern in _PICKLES):
        return ""
    return ". If you trust it, convert it: load it and write it with safetensors.torch.save_file or save_pretrained"

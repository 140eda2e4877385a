"""Weights of models other than Hugging Face's, from safetensors files, checkpoints or the hub."""

from collections.abc import Mapping
from pathlib import Path

import torch

from shardlaunch.checkpoints.layout import CHECKPOINTS, MANIFEST
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_path
from shardlaunch.errors import UserError


def stored_weights(source: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of safetensors files that have a name in `expected`; others are ignored.

    `source`, the value of --weights: a safetensors file, a folder with model*.safetensors, a checkpoint, a run folder
    (its newest valid checkpoint), or a hub id with a file model.safetensors. Raises UserError when it is not found, and
    for a tensor that is missing or of another shape. Batch norm's `num_batches_tracked` may be missing, as in files
    from before torch 0.4.1.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in _weight_files(source):
        try:
            with safe_open(file, framework="pt") as stored:
                tensors.update({name: stored.get_tensor(name) for name in expected.keys() & set(stored.keys())})
        except (OSError, SafetensorError) as error:
            raise UserError(f"--weights {file}: not a readable safetensors file ({error})") from error
    for name, tensor in expected.items():
        if name not in tensors and name.endswith(".num_batches_tracked"):
            continue
        wanted, found = list(tensor.shape), list(tensors[name].shape) if name in tensors else "missing"
        if wanted != found:
            raise UserError(
                f"--weights {source}: does not fit this model: {name} is {found} and must be {wanted}; "
                f"use other weights, or the model options that these weights were trained with"
            )
    return tensors


def _weight_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        if (path / MANIFEST).exists() or (path / CHECKPOINTS).is_dir():
            try:
                path = open_path(path, peers=Peers(), warn=lambda text: None).step_dir
            except UserError as error:
                raise UserError(f"--weights {error}") from error
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise UserError(f"--weights {source}: no model*.safetensors in this folder")
        return files
    return [_from_hub(source)]


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except Exception as error:  # the hub client raises many kinds of errors
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--weights {source}: not found locally or on the Hugging Face Hub ({reason}). "
            f"Give a safetensors file, a run folder or a hub id, or use --preset demo, which works offline."
        ) from error

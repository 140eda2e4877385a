"""Weights of models that are not Hugging Face's, from safetensors files, checkpoints, or the hub."""

from collections.abc import Mapping
from pathlib import Path

import torch

from shardlaunch.checkpoints.layout import CHECKPOINTS, MANIFEST
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_path
from shardlaunch.errors import UserError


def stored_weights(source: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that safetensors files hold under the names of `expected`; other names in them are left.

    `source`, the value of --weights: such a file, a folder with files model*.safetensors, a checkpoint of a run, a
    run's folder (of which the newest valid checkpoint), or a hub id with a file model.safetensors. Raises UserError
    when they are not to be had, and for a tensor that is absent or of another shape. Batch norm's count of batches may
    be absent: files from before torch 0.4.1 do not have it.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in _weight_files(source):
        try:
            with safe_open(file, framework="pt") as stored:
                tensors.update({name: stored.get_tensor(name) for name in expected.keys() & set(stored.keys())})
        except (OSError, SafetensorError) as error:
            raise UserError(f"--weights {file}: not a safetensors file that can be read ({error})") from error
    for name, tensor in expected.items():
        if name not in tensors and name.endswith(".num_batches_tracked"):
            continue
        wanted, found = list(tensor.shape), list(tensors[name].shape) if name in tensors else "absent"
        if wanted != found:
            raise UserError(
                f"--weights {source}: not of this model: {name} is {found} and must be {wanted}; "
                f"take other weights, or give the model's options the values that they were made with"
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
            raise UserError(f"--weights {source}: there is no model*.safetensors in this folder")
        return files
    return [_from_hub(source)]


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except Exception as error:  # the hub's client raises errors of many families
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--weights {source}: neither a local path nor to be had from the hub ({reason}). "
            f"Give a safetensors file or a run's folder, or use --preset demo, which needs no hub."
        ) from error

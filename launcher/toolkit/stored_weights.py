"""Weights of models that are not Hugging Face's, from safetensors files, checkpoints, or the hub."""

from collections.abc import Mapping
from pathlib import Path

import torch

from shardlaunch.checkpoints.weight_files import open_weights
from shardlaunch.errors import UserError


def stored_weights(source: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that safetensors files hold under the names of `expected`; other names in them are left.

    `source`, the value of --weights: such a file, a folder with files model*.safetensors, a checkpoint of a run, a
    run's folder (of which the newest valid checkpoint), or a hub id with a file model.safetensors. Raises UserError
    when they are not to be had, and for a tensor that is absent or of another shape. Batch norm's count of batches may
    be absent: files from before torch 0.4.1 do not have it.
    """
    path = Path(source).expanduser()
    try:
        weights = open_weights(path if path.exists() else _from_hub(source), warn=lambda text: None)
    except UserError as error:
        raise UserError(f"--weights {error}") from error
    tensors = {name: weights.read(name) for name in expected.keys() & weights.shapes.keys()}
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


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except Exception as error:  # the hub's client raises errors of many families
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source}: neither a local path nor to be had from the hub ({reason}). "
            f"Give a safetensors file or a run's folder, or use --preset demo, which needs no hub."
        ) from error

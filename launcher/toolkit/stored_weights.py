"""Weights of models other than Hugging Face's, from safetensors files, checkpoints or the hub."""

from collections.abc import Mapping
from pathlib import Path

import torch

from shardlaunch.checkpoints.stored import StoredTensors
from shardlaunch.checkpoints.weight_files import open_weights
from shardlaunch.errors import UserError


def stored_weights(
    source: str, expected: Mapping[str, torch.Tensor], *, option: str = "--weights"
) -> Mapping[str, torch.Tensor]:
    """Return the tensors of safetensors files that have a name in `expected`; others are ignored.

    They are read when they are asked for, and under FSDP2 and ZeRO 3 each process reads its shards.

    `source`, the value of the option that errors name: a safetensors file, a folder with model*.safetensors, a
    checkpoint, a run folder (its newest valid checkpoint), or a hub id with a file model.safetensors. Raises UserError
    when it is not found, and for a tensor that is missing or of another shape. Batch norm's
    `num_batches_tracked` may be missing, as in files from before torch 0.4.1.
    """
    path = Path(source).expanduser()
    try:
        weights = open_weights(path if path.exists() else _from_hub(source), warn=lambda text: None)
    except UserError as error:
        raise UserError(f"{option} {error}") from error
    for name, tensor in expected.items():
        if name not in weights.shapes and name.endswith(".num_batches_tracked"):
            continue
        wanted, found = list(tensor.shape), list(weights.shapes[name]) if name in weights.shapes else "missing"
        if wanted != found:
            raise UserError(
                f"{option} {source}: does not fit this model: {name} is {found} and must be {wanted}; "
                f"use other weights, or the model options that these weights were trained with"
            )
    names = [name for name in expected if name in weights.shapes]
    places = {name: weights.places[name] for name in names if name in weights.places}
    return StoredTensors(places=places, tensors={name: weights.read(name) for name in names if name not in places})


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except Exception as error:  # the hub client raises many kinds of errors
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source}: not found locally or on the Hugging Face Hub ({reason}). "
            f"Give a safetensors file, a run folder or a hub id, or use --preset demo, which works offline."
        ) from error

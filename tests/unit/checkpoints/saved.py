"""Small checkpoints that the tests of this folder save, and how they damage them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from shardlaunch.checkpoints.digests import crc64nvme
from shardlaunch.checkpoints.names import RECIPE
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.records import Position, to_json
from shardlaunch.checkpoints.shares import share_of
from shardlaunch.checkpoints.state import EMA, OPTIMIZER, Fragment, whole
from shardlaunch.checkpoints.writer import save

RECIPE_RECORD = {
    "recipe": "mnist_mlp.MnistMlp",
    "options": {"lr": 0.1, "seed": 0},
    "run": {"identity": {"lr": 0.1}, "warn": {"torch": "2.13.0"}},
}


def tensors(*, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the weights and buffers of a small model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(8, 4, generator=generator),
        "layer.bias": torch.randn(8, generator=generator),
        "norm.running_mean": torch.randn(8, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
        "nothing": torch.empty(0, 4),
    }


def save_step(
    checkpoints_dir: Path,
    step: int,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    averages: Mapping[str, torch.Tensor] | None = None,
    aliases: Mapping[str, str] | None = None,
    position: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Save a checkpoint of `weights` (default: those of `tensors`) with Adam's state for the first one.

    `averages` are those of weights, by name.
    """
    weights = tensors(seed=step) if weights is None else weights
    state: list[Fragment] = [whole(name, tensor) for name, tensor in weights.items()]
    if weights:
        name, tensor = next(iter(weights.items()))
        state += [whole(name, tensor * 2, section=OPTIMIZER, entry="exp_avg")]
    state += [whole(name, tensor, section=EMA) for name, tensor in (averages or {}).items()]

    def export(folder: Path) -> None:
        (folder / RECIPE).write_bytes(to_json(recipe or RECIPE_RECORD))
        for name, text in (files or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)

    where = Position(step=step, **(position or {}))
    return save(
        checkpoints_dir, position=where, share=share_of(state), export=export, aliases=aliases or {}, peers=Peers()
    )


def flip(path: Path) -> None:
    """Change one bit at the end of a file, where the tensors of safetensors are."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def weights_file(step_dir: Path) -> Path:
    """Return the file of a checkpoint's weights."""
    return next(step_dir.glob("model-*.safetensors"))


def sign(step_dir: Path, name: str) -> None:
    """Write the digest of a changed file into the manifest."""
    body = json.loads((step_dir / "manifest.json").read_bytes())
    data = (step_dir / name).read_bytes()
    body["files"][name] = {"bytes": len(data), "crc64nvme": f"{crc64nvme(data):016x}"}
    body.pop("xxh3_128")
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    (step_dir / "manifest.json").write_text(json.dumps({**body, "xxh3_128": xxhash.xxh3_128_hexdigest(text)}))

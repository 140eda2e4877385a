"""Merge the LoRA adapter of a model of peft into its base model, tensor by tensor, without building the model."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.exporting import Weight, weights_of
from shardlaunch.checkpoints.names import ADAPTER_CONFIG
from shardlaunch.checkpoints.names import ADAPTER_PREFIX as PREFIX
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import decode, read_bytes
from shardlaunch.errors import UserError, some

_LORA = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight")
_SAVED = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)")
_ORIGINAL = re.compile(r"(.+)\.original_module\.(.+)")
_UNSUPPORTED = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters")


def is_adapted(weights: Sequence[Weight]) -> bool:
    """Return whether weights are those of a model of peft, with its base model."""
    return any(weight.name.startswith(PREFIX) for weight in weights)


def merged(checkpoint: Checkpoint, *, is_average: bool = False) -> list[Weight]:
    """Return the weights of a base model with its LoRA adapter merged in, under the base model's own names.

    Each weight W becomes W + B A * lora_alpha / r (or / sqrt(r) with rank-stabilised LoRA), in float32. Modules that
    peft trained as a whole (`modules_to_save`) take the place of the base model's. Raises UserError for what cannot be
    merged so.
    """
    where, weights = checkpoint.step_dir, weights_of(checkpoint, is_average=is_average)
    if not is_adapted(weights):
        raise UserError(f"--merge: {where} holds no model of peft (no weight begins with {PREFIX}); remove it")
    if ADAPTER_CONFIG not in checkpoint.manifest.files:
        raise UserError(
            f"--merge: {where} has no {ADAPTER_CONFIG}, which says how the adapter counts; let the recipe's export() "
            f"write it: model.peft_config['default'].save_pretrained(folder)"
        )
    scale, is_transposed = _scale(where / ADAPTER_CONFIG)
    by_name = {weight.name: weight for weight in weights}
    lora: dict[str, dict[str, Weight]] = {}
    saved: dict[str, Weight] = {}
    adapters = set()
    for name, weight in by_name.items():
        for pattern in (_LORA, _SAVED):
            if match := pattern.fullmatch(name):
                adapters.add(match[3] if pattern is _LORA else match[2])
                if pattern is _LORA:
                    lora.setdefault(match[1], {})[match[2]] = weight
                else:
                    saved[f"{match[1]}.{match[3]}"] = weight
    if len(adapters) != 1:
        found = (
            f"{len(adapters)} adapters ({some(sorted(adapters))})"
            if adapters
            else "no LoRA adapter of layers with a weight matrix"
        )
        raise UserError(f"--merge: {where} holds {found}; exactly one can be merged")
    taken = {weight.name for pair in lora.values() for weight in pair.values()} | {one.name for one in saved.values()}
    result = []
    for name, weight in by_name.items():
        if name in taken:
            continue
        module, _, last = name.rpartition(".")
        base = module.removesuffix(".base_layer")
        if original := _ORIGINAL.fullmatch(name):
            plain = f"{original[1]}.{original[2]}"
            result.append(_renamed(saved.pop(plain, weight), plain))
        elif last == "weight" and base in lora and base != module:
            pair = lora.pop(base)
            result.append(_renamed(_merged(weight, pair, scale, is_transposed, where), f"{base}.weight"))
        else:
            result.append(_renamed(weight, f"{base}.{last}" if base != module else name))
    unknown = [weight.name for weight in result if re.search(r"\.(lora_|ia3_|hada_|oft_|vera_|boft_)", weight.name)]
    unplaced = [*lora, *saved, *unknown]
    if unplaced:
        raise UserError(f"--merge: only LoRA on layers with a weight matrix can be merged, not {some(unplaced, 3)}")
    return result


def _scale(path: Path) -> tuple[float, bool]:
    """Return by what B A is multiplied, and whether the layers keep their weights transposed."""
    config = decode(path, read_bytes(path), dict[str, Any])
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"--merge: {path} is of an adapter of type {kind}; only LORA can be merged")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise UserError(f"--merge: {path} uses {some(used)}, which cannot be merged here; merge_and_unload of peft can")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"--merge: {path} has no r and lora_alpha")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return alpha / divisor, bool(config.get("fan_in_fan_out"))


def _merged(weight: Weight, pair: dict[str, Weight], scale: float, is_transposed: bool, where: Path) -> Weight:
    a, b = pair.get("A"), pair.get("B")
    shape = weight.shape[::-1] if is_transposed else weight.shape
    if a is None or b is None or len(shape) != 2 or (b.shape[:1], a.shape[1:]) != (shape[:1], shape[1:]):
        raise UserError(f"--merge: {where}: the adapter of {weight.name} does not fit its weight")

    def read(start: int, end: int) -> torch.Tensor:
        rows = _whole(b).float() @ _whole(a).float()
        change = (rows.T if is_transposed else rows).reshape(-1)[start:end] * scale
        return (weight.read(start, end).float() + change).to(weight.dtype)

    return Weight(name=weight.name, shape=weight.shape, dtype=weight.dtype, read=_remembering(read, weight))


def _remembering(read: Callable[[int, int], torch.Tensor], weight: Weight) -> Callable[[int, int], torch.Tensor]:
    """Read a whole tensor once for all its pieces, and forget it with the last one."""
    kept: list[torch.Tensor] = []

    def piece(start: int, end: int) -> torch.Tensor:
        if not kept:
            kept.append(read(0, weight.num_elements))
        found = kept[0][start:end]
        if end == weight.num_elements:
            kept.clear()
        return found

    return piece


def _whole(weight: Weight) -> torch.Tensor:
    return weight.read(0, weight.num_elements).view(weight.shape)


def _renamed(weight: Weight, name: str) -> Weight:
    return Weight(name=name.removeprefix(PREFIX), shape=weight.shape, dtype=weight.dtype, read=weight.read)

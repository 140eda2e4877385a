"""Parameter groups for optimizers."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay (matrices) and those without (biases, norms: one dimension)."""
    tensors = [parameter for _, parameter in parameters]
    groups = [
        {"params": [p for p in tensors if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in tensors if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

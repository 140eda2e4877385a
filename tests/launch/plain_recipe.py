"""A recipe file for tests of how runs are started: next to nothing to load or to train, and no metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardlaunch import Options, Recipe, TensorData, launch, option


@dataclass(kw_only=True)
class PlainOptions(Options):
    """Options of the plain recipe."""

    global_batch_size: int = 8
    micro_batch_size: int = 2
    max_steps: int = 3
    tracker: str = option("none", mark="free")


class Plain(Recipe):
    """A linear layer on rows of ones."""

    options: PlainOptions

    def datasets(self) -> Mapping[str, Any]:
        return {"train": TensorData(inputs=torch.ones(64, 4), labels=torch.zeros(64, dtype=torch.int64))}

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(4, 2)

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")


launch(Plain)

"""Classify points of a folder of Parquet files that need not fit into memory.

python stream_parquet.py --data FOLDER, where FOLDER has train-*.parquet and eval-*.parquet with the columns `point`
(lists of four numbers) and `kind` (0, 1 or 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, launch, option
from shardlaunch.data import FileOptions, load_shards
from shardlaunch.metrics import named_metrics


@dataclass(kw_only=True)
class StreamOptions(FileOptions):
    """Options of this recipe."""

    noise: float = option(0.1, minimum=0)
    """Standard deviation of the noise that is added to the points, other noise in each epoch."""


class StreamParquet(Recipe):
    """A small net on points that are read block by block."""

    options: StreamOptions
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        return load_shards(self.options.data, columns=["point", "kind"], transform=self._row, options=self.options)

    def _row(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {"inputs": torch.tensor(sample["point"]).float(), "labels": sample["kind"]}

    def collate(self, samples: Any, seeds: Any) -> Any:
        batch = super().collate(samples, seeds)
        if seeds is not None:  # of training
            batch["inputs"] += self.options.noise * torch.randn_like(batch["inputs"])
        return batch

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        return named_metrics("accuracy", num_classes=3)


launch(StreamParquet)

"""The recipe that benchmarks/comm_volume.py runs: blocks of two linear layers, as many numbers in each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, TensorData, launch

WIDTH, BLOCKS, CLASSES, SAMPLES = 512, 8, 16, 1024


class Block(nn.Module):
    """Two linear layers and what they are added to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.second(F.relu(self.first(values)))


class Blocks(Recipe):
    """Train blocks on random numbers."""

    layer_classes = ("Block",)

    def datasets(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
        return {"train": TensorData(inputs=inputs, labels=torch.randint(CLASSES, (SAMPLES,), generator=generator))}

    def model(self) -> nn.Module:
        return nn.Sequential(*(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, CLASSES))

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")


if __name__ == "__main__":
    launch(Blocks)

"""LoRA in a net of one's own: it learns digits; then adapters of low rank learn them lying on their side."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from shardlaunch import Options, Recipe, TensorData, UserError, launch, option
from shardlaunch.metrics import named_metrics


@dataclass(kw_only=True)
class LoraOptions(Options):
    """Options of the adapters."""

    lr: float = 2e-3
    epochs: int = 10
    rank: int = option(0, minimum=0)
    """Rank of the adapters of a net that --init-from names, which learn digits on their side; 0: train it."""


class AdaptedLinear(nn.Linear):
    """A linear layer that is frozen, and the product of two narrow matrices, at first zero, beside it."""

    def __init__(self, num_inputs: int, num_outputs: int, rank: int) -> None:
        super().__init__(num_inputs, num_outputs)
        self.requires_grad_(False)
        self.down = nn.Linear(num_inputs, rank, bias=False)
        self.up = nn.Linear(rank, num_outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs):
        return super().forward(inputs) + self.up(self.down(inputs))


class LoraRecipe(Recipe):
    """Classify digits; with --rank, digits that lie on their side."""

    options: LoraOptions
    best_metric = "accuracy"

    def datasets(self):
        images, labels = load_digits(return_X_y=True)
        inputs, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        if self.options.rank:
            inputs = inputs.reshape(-1, 8, 8).rot90(dims=(1, 2)).flatten(1)
        return {
            "train": TensorData(inputs=inputs[:1400], labels=labels[:1400]),
            "eval": TensorData(inputs=inputs[1400:], labels=labels[1400:]),
        }

    def model(self):
        rank = self.options.rank
        if rank and not self.options.init_from:
            raise UserError("--rank: adapters need a net that has learned; give --init-from a run without --rank")
        layers = [
            AdaptedLinear(*size, rank) if rank else nn.Linear(*size) for size in ((64, 256), (256, 256), (256, 10))
        ]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return named_metrics("accuracy", num_classes=10)


if __name__ == "__main__":
    launch(LoraRecipe)

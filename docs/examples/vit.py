"""A small vision transformer of transformers from scratch, with an exponential moving average of its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from shardlaunch import Options, Recipe, TensorData, launch, option
from shardlaunch.metrics import named_metrics


@dataclass(kw_only=True)
class VitOptions(Options):
    """Options of the vision transformer."""

    lr: float = 2e-3
    weight_decay: float = 0.05
    epochs: int = 20
    ema: float = 0.98
    patch: int = option(2, minimum=1, maximum=8)
    """Pixels of a patch's side."""


class VitRecipe(Recipe):
    """Classify digits by patches."""

    options: VitOptions
    best_metric = "accuracy"

    def datasets(self):
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        train, held_out = slice(0, 1400), slice(1400, None)
        return {
            name: TensorData(pixel_values=images[rows], labels=torch.tensor(labels[rows]))
            for name, rows in (("train", train), ("eval", held_out))
        }

    def model(self):
        config = ViTConfig(
            image_size=8,
            patch_size=self.options.patch,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_dropout_prob=0.1,
            num_labels=10,
        )
        return ViTForImageClassification(config)

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs.logits, batch["labels"], reduction="sum")

    def metrics(self):
        return named_metrics("accuracy", num_classes=10)

    def export(self, folder: Path, model):
        model.config.save_pretrained(folder)


if __name__ == "__main__":
    launch(VitRecipe)

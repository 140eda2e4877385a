"""Random augmentation in `__getitem__`, from the global generators: seeded per row, whoever loads it."""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from shardlaunch import Options, Recipe, launch, option


@dataclass(kw_only=True)
class AugmentationOptions(Options):
    """Options of the augmentation."""

    lr: float = 2e-3
    epochs: int = 60
    num_train: int = option(200, minimum=10, maximum=1400)
    """Images to learn from."""
    augment: bool = True
    """Shift, dim and blur training images with noise, in another way each time."""


class Digits(Dataset):
    """Images of digits with labels, changed at random where wanted."""

    def __init__(self, rows: slice, augment: bool) -> None:
        source = load_digits()
        self.images, self.labels = source.images[rows].astype(np.float32) / 16, source.target[rows]
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = torch.from_numpy(self.images[index])[None]
        if self.augment:
            x, y = random.randrange(3), random.randrange(3)
            image = F.pad(image, (1, 1, 1, 1))[:, y : y + 8, x : x + 8]
            image = image * np.random.uniform(0.7, 1.3) + 0.1 * torch.randn(image.shape)
        return image.float(), int(self.labels[index])


class AugmentationRecipe(Recipe):
    """Classify digits, of which few are known."""

    options: AugmentationOptions
    best_metric = "accuracy"

    def datasets(self):
        return {
            "train": Digits(slice(0, self.options.num_train), self.options.augment),
            "eval": Digits(slice(1400, None), augment=False),
        }

    def model(self):
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
        )

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}


if __name__ == "__main__":
    launch(AugmentationRecipe)

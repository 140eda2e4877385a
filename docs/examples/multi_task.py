"""Two tasks with one trunk: which digit an image shows, known for few, and how much ink is in its upper half."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchmetrics import R2Score
from torchmetrics.classification import MulticlassAccuracy

from shardlaunch import Options, Recipe, TensorData, launch, option


@dataclass(kw_only=True)
class MultiTaskOptions(Options):
    """Options of the two tasks."""

    lr: float = 2e-3
    epochs: int = 20
    known: float = option(0.2, above=0, maximum=1)
    """Part of the training images whose digit is known."""


class TwoHeads(nn.Module):
    """A trunk and two heads."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.digit = nn.Linear(width, 10)
        self.ink = nn.Linear(width, 1)

    def forward(self, inputs):
        features = self.trunk(inputs)
        return {"digit": self.digit(features), "ink": self.ink(features).squeeze(1)}


class MultiTaskRecipe(Recipe):
    """Classify digits and measure ink."""

    options: MultiTaskOptions
    best_metric = "accuracy"

    def datasets(self):
        source = load_digits()
        images = torch.tensor(source.data / 16, dtype=torch.float32)
        digit, ink = torch.tensor(source.target), images[:, :32].sum(dim=1) / images.sum(dim=1)
        ink = (ink - ink[:1400].mean()) / ink[:1400].std()
        draw = torch.rand(2, 1400, generator=torch.Generator().manual_seed(0))
        held_out = TensorData(inputs=images[1400:], digit=digit[1400:], ink=ink[1400:])
        digit = digit[:1400].where(draw[0] < self.options.known, -100)
        ink = ink[:1400].where(draw[1] < 0.7, torch.nan)
        return {"train": TensorData(inputs=images[:1400], digit=digit, ink=ink), "eval": held_out}

    def model(self):
        return TwoHeads()

    def num_targets(self, batch):
        return {"digit": int((batch["digit"] != -100).sum()), "ink": int((~batch["ink"].isnan()).sum())}

    def loss(self, outputs, batch):
        digit = F.cross_entropy(outputs["digit"], batch["digit"], reduction="sum")
        known = ~batch["ink"].isnan()
        ink = F.mse_loss(outputs["ink"][known], batch["ink"][known], reduction="sum")
        return {"digit": digit, "ink": ink}

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(num_classes=10, average="micro"), "r2": R2Score()}

    def update_metrics(self, metrics, outputs, batch):
        metrics["accuracy"].update(outputs["digit"], batch["digit"])
        metrics["r2"].update(outputs["ink"], batch["ink"])


if __name__ == "__main__":
    launch(MultiTaskRecipe)

"""Odd parameters: normed weights, an orthogonal and a tied one, a scalar, complex numbers, a buffer that learns."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from shardlaunch import Options, Recipe, TensorData, launch
from shardlaunch.metrics import named_metrics


@dataclass(kw_only=True)
class OddOptions(Options):
    """Options of the net."""

    lr: float = 2e-3
    epochs: int = 20
    weight_decay: float = 0.01


class OddNet(nn.Module):
    """A net of layers with constraints."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(64, width))
        self.turn = orthogonal(nn.Linear(width, width, bias=False))
        self.smooth = spectral_norm(nn.Linear(width, width))
        self.again = nn.Linear(width, width)
        self.again.bias = self.smooth.bias  # tied
        self.filter = nn.Parameter(torch.view_as_real(torch.ones(width // 2 + 1, dtype=torch.complex64)))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(width, 10)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, inputs):
        if self.training:
            self.mean.lerp_(inputs.mean(dim=0), 0.1)
        hidden = self.turn(F.relu(self.first(inputs - self.mean)))
        hidden = torch.fft.irfft(torch.fft.rfft(hidden) * torch.view_as_complex(self.filter), n=hidden.shape[1])
        hidden = hidden + F.relu(self.again(F.relu(self.smooth(hidden))))
        return self.head(hidden) * self.temperature


class OddRecipe(Recipe):
    """Classify digits."""

    options: OddOptions
    best_metric = "accuracy"

    def datasets(self):
        images, labels = load_digits(return_X_y=True)
        inputs, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        return {
            "train": TensorData(inputs=inputs[:1400], labels=labels[:1400]),
            "eval": TensorData(inputs=inputs[1400:], labels=labels[1400:]),
        }

    def model(self):
        return OddNet()

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return named_metrics("accuracy", num_classes=10)


if __name__ == "__main__":
    launch(OddRecipe)

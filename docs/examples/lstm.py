"""An LSTM on packed sequences: the inked pixels of a digit, one after another, of some images more than of others."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence, unpad_sequence
from torchmetrics.classification import MulticlassAccuracy

from shardlaunch import Options, Recipe, launch, option


@dataclass(kw_only=True)
class LstmOptions(Options):
    """Options of the sequence classifier."""

    lr: float = 5e-3
    max_grad_norm: float = 1.0
    epochs: int = 20
    width: int = option(64, minimum=1)
    """Width of the hidden state."""


class Reader(nn.Module):
    """The last state of an LSTM in each direction, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, width, bidirectional=True)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, points, lengths):
        sequences = pack_sequence(unpad_sequence(points, lengths, batch_first=True), enforce_sorted=False)
        return self.head(torch.cat(tuple(self.lstm(sequences)[1][0]), dim=1))


class LstmRecipe(Recipe):
    """Read digits pixel by pixel."""

    options: LstmOptions
    best_metric = "accuracy"

    def datasets(self):
        pairs = zip(load_digits().images, load_digits().target, strict=True)
        rows = [{"points": self._points(image), "labels": label} for image, label in pairs]
        return {"train": rows[:1400], "eval": rows[1400:]}

    def _points(self, image):
        """Return row, column and ink of each pixel with ink, between -1 and 1."""
        y, x = np.nonzero(image > 4)
        return torch.tensor(np.stack((y / 3.5 - 1, x / 3.5 - 1, image[y, x] / 8 - 1), axis=1), dtype=torch.float32)

    def lengths(self, dataset):
        return np.array([len(row["points"]) for row in dataset])

    def model(self):
        return Reader(self.options.width)

    def collate(self, samples, seeds):
        points = [sample["points"] for sample in samples]
        return {
            "points": pad_sequence(points, batch_first=True),
            "lengths": torch.tensor([len(one) for one in points]),
            "labels": torch.tensor([sample["labels"] for sample in samples]),
        }

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}


if __name__ == "__main__":
    launch(LstmRecipe)

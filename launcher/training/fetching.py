"""Fetch samples from a data set, with the generators that its transforms draw from seeded by (seed, epoch, sample)."""

from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

import numpy as np
from torch.utils.data import Subset

from shardlaunch.checkpoints.files import retried
from shardlaunch.launcher.seeding import sample_seeds, seed_generators
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.progress import COUNT, SAMPLE, STEP, progress

EVALUATION = -1
"""The epoch whose seeds all evaluations use."""


def fetched(dataset: Any, samples: np.ndarray, seeds: np.ndarray) -> Any:
    """Return rows of a data set, as its collate() takes them. `seeds` has one integer per sample.

    The global generators of torch, numpy and Python are seeded before each row, or, where a data set fetches several
    rows at a time, by the first row's seed before all of them.
    """
    if isinstance(dataset, TensorData):
        return dataset.rows_at(samples)
    if hasattr(dataset, "rows_at"):
        return _seeded(seeds[0], lambda: dataset.rows_at(samples))
    by_row = isinstance(dataset, Subset) and not hasattr(dataset.dataset, "__getitems__")
    if hasattr(dataset, "__getitems__") and not by_row:
        return _seeded(seeds[0], lambda: dataset.__getitems__(samples.tolist()))
    rows = []
    loading = progress.loading
    loading[COUNT] = 1
    for sample, seed in zip(samples.tolist(), seeds.tolist(), strict=True):
        loading[SAMPLE] = sample
        progress.advance()
        rows.append(_seeded(seed, partial(getitem, dataset, sample)))
    return rows


def _seeded(seed: int, fetch: Callable[[], Any]) -> Any:
    """Seed the generators and fetch; after an error of the file system that may pass, do it again."""

    def attempt() -> Any:
        seed_generators(int(seed))
        return fetch()

    return retried(attempt)


def row_of(dataset: Any, sample: int, seed: int) -> Any:
    """Return one row as the first epoch has it."""
    loading = progress.loading
    loading[STEP], loading[SAMPLE], loading[COUNT] = -1, sample, 1
    row = _seeded(sample_seeds(seed, 0, np.array([sample]))[0], partial(getitem, dataset, sample))
    loading[STEP] = 0
    return row

"""Fetch samples from a data set, with the generators that its transforms draw from seeded by (seed, epoch, sample)."""

from collections.abc import Callable, Mapping
from functools import partial
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from shardlaunch.checkpoints.files import retried
from shardlaunch.errors import UserError
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
    if hasattr(dataset, "parts_at"):
        return _of_parts(dataset, samples, seeds)
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


def _of_parts(dataset: Any, samples: np.ndarray, seeds: np.ndarray) -> Any:
    """Return rows of a data set of several, in the order of the samples: a list, or columns if all parts have these."""
    found = [(places, fetched(part, inner, seeds[places])) for part, inner, places in dataset.parts_at(samples)]
    have_columns = [isinstance(rows, Mapping) for _, rows in found]
    if len(found) == 1:
        return found[0][1]
    if all(have_columns):
        order = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in found])))
        names = found[0][1].keys()
        return {name: torch.cat([rows[name] for _, rows in found]).index_select(0, order) for name in names}
    if any(have_columns):
        raise UserError("data sets that are mixed must be alike: some have columns of tensors, and some have rows")
    in_order: list[Any] = [None] * len(samples)
    for places, rows in found:
        for place, row in zip(places.tolist(), rows, strict=True):
            in_order[place] = row
    return in_order


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

"""Check that a data set's rows are the same when they are fetched again."""

from typing import Any

import numpy as np
import xxhash

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.runs.identity import digest_value
from shardlaunch.launcher.runs.iterables import Stream
from shardlaunch.launcher.seeding import seeded
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.launcher.training.fetching import row_of

LOOKS = 8  # rows that are fetched twice


def check_second_look(dataset: Any, name: str, *, seed: int) -> None:
    """Raise UserError for rows of the `name` data that differ at a second look with the generators seeded alike."""
    is_table = hasattr(dataset, "with_format") and hasattr(dataset, "data") and dataset.format["type"] != "custom"
    if isinstance(dataset, TensorData) or is_table or getattr(dataset, "is_stored", False):
        return
    spread = np.unique(np.linspace(0, len(dataset) - 1, LOOKS).astype(np.int64)).tolist()
    rows = dataset.rows_to_compare(LOOKS) if isinstance(dataset, Stream) else spread
    with seeded(seed):
        looks = [[_row_digest(row_of(dataset, row, seed)) for row in rows] for _ in range(2)]
    differing = [str(row) for row, one, other in zip(rows, *looks, strict=True) if one != other]
    if differing:
        raise UserError(
            f"the {name} data is not the same at a second look: row {some(differing)}. A data set may draw from the "
            f"global generators of torch, numpy and random, which are seeded for each row and epoch; a generator of "
            f"its own it must seed itself in __getitem__, such as np.random.default_rng(torch.initial_seed()). Rows "
            f"that depend on what was read before cannot be resumed"
        )


def _row_digest(row: Any) -> str:
    digest = xxhash.xxh3_128()
    digest_value(digest, row)
    return digest.hexdigest()

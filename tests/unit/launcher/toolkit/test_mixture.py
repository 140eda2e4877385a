"""Data sets that are mixed: rows of every kind, options that say when weights change, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from shardlaunch import Options, TensorData, UserError
from shardlaunch.data import Mixture, load_shards, load_splits
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.runs.identity import data_fingerprint
from shardlaunch.launcher.toolkit.mixture import sources_of
from shardlaunch.launcher.training.fetching import fetched
from tests.shard_files import samples, write_parquet


class _Rows:
    """A data set of rows that depend on the row's own seed."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> tuple[int, int]:
        return self._first + row, int(torch.randint(1 << 30, ()))


def _mixture(*weights: float) -> Mixture:
    return Mixture([(_Rows(100 * number, 10 + number), weight) for number, weight in enumerate(weights)])


def test_rows_keep_their_seeds_and_places() -> None:
    mixture = _mixture(1, 1, 1)
    at = np.array([12, 0, 32, 10, 3])
    rows = fetched(mixture, at, np.arange(5))
    assert [row[0] for row in rows] == [102, 0, 211, 100, 3] == [mixture[int(n)][0] for n in at]
    alone = [fetched(mixture, at[n : n + 1], np.array([n]))[0] for n in range(5)]
    assert rows == alone
    columns = [TensorData(a=torch.arange(first, first + 5), b=torch.rand(5, 2)) for first in (0, 50)]
    found = fetched(Mixture([(data, 1) for data in columns]), np.array([7, 2, 6, 0]), np.arange(4))
    assert found["a"].tolist() == [52, 2, 51, 0]
    assert torch.equal(found["b"][0], columns[1].columns["b"][2])
    with pytest.raises(UserError, match="must be alike"):
        fetched(Mixture([(columns[0], 1), (_Rows(0, 5), 1)]), np.array([0, 7]), np.arange(2))


def test_weights_change_at_steps(tmp_path: Path) -> None:
    mixture = Mixture([(_Rows(0, 10), "0.5"), (_Rows(100, 15), 0.5)], names=["a", "b"])
    options = Options(global_batch_size=8, micro_batch_size=4, data_weights=("2:1,0", "7:1/4,3/4"))
    with collected() as notes:
        order = mixture.shuffled_order(options)
    # 4 steps per epoch, the last one of 1 sample: 16 samples before step 2, 49 before step 7
    whole = np.concatenate([order.samples(0, epoch, np.arange(25)) for epoch in range(4)])
    assert [np.bincount(part >= 10, minlength=2).tolist() for part in np.split(whole, [16, 49, 97])][:3] == [
        [8, 8],
        [33, 0],
        [12, 36],
    ]
    assert "mixed by weights: a 0.5 (1.25 times per epoch), b 0.5 (0.83 times per epoch)" in notes.data
    assert any("from sample 49 on" in line for line in notes.data)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("1",), "must be STEP:WEIGHT"),
        (("x:1,2",), "must be STEP:WEIGHT"),
        (("5:1,2", "5:2,1"), "ascending"),
        (("5:1,2,3",), "3 weights for 2 sources"),
        (("5:1,-2",), "from 0"),
        (("0:1,0",), "source 2 of the data has a weight of 0 throughout"),
    ],
)
def test_other_words_are_refused(given: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        _mixture(1, 1).shuffled_order(Options(data_weights=given))


def test_what_is_no_mixture_is_refused() -> None:
    with pytest.raises(UserError, match="two data sets or more"):
        Mixture([(_Rows(0, 3), 1)])
    with pytest.raises(UserError, match="source 2 of the Mixture has no rows"):
        Mixture([(_Rows(0, 3), 1), (_Rows(0, 0), 1)])
    stream = type("Sized", (IterableDataset,), {"__len__": lambda self: 3, "__iter__": iter})()
    with pytest.raises(UserError, match="source 2 of the Mixture is a Sized: it needs"):
        Mixture([(_Rows(0, 3), 1), (stream, 1)])
    with pytest.raises(UserError, match="a generator"):
        Mixture([((n for n in range(3)), 1), (_Rows(0, 0), 1)])
    with pytest.raises(UserError, match="--shuffle-window: has no effect"):
        _mixture(1, 1).shuffled_order(Options(shuffle_window=8))
    with pytest.raises(UserError, match="which this recipe does not mix"):
        load_splits("a.csv:0.7 b.csv:0.3", seed=0)


def test_shards_are_mixed_block_by_block(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("a", 60), ("b", 30)):
        write_parquet(tmp_path / f"{name}.parquet", samples(1000 * (name == "b"), count))
    parts = [load_shards(str(tmp_path / f"{name}.parquet"))["train"] for name in "ab"]
    mixture = Mixture([(parts[0], 1), (parts[1], 2)])
    order = mixture.shuffled_order(Options(shuffle_window=20))
    mixture.hold_samples(order, 1)
    assert mixture.has_blocks
    read: list[int] = []
    for number, part in enumerate(parts):
        monkeypatch.setattr(part, "_read", lambda block, n=number, of=part._read: read.append(n) or of(block))
    numbers = [mixture[int(n)]["number"] for n in order.samples(0, 0, np.arange(90))]
    assert sum(number >= 1000 for number in numbers) == 60
    assert read.count(0) == 4, "half of a, in two windows of two blocks"
    assert 3 <= read.count(1) <= 6, "all of b, twice"
    assert len({data_fingerprint(mixture), data_fingerprint(Mixture([(part, 1) for part in parts[::-1]]))}) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:0.7 b:0.3", [("a", "0.7"), ("b", "0.3")]),
        ("'my data/*.csv':2 o/n:config:.5", [("my data/*.csv", "2"), ("o/n:config", ".5")]),
        ("a:3", []),
        ("a:1 b", []),
        ("a b", []),
        ("o/n:1e5 b:2", []),
        ("it's:1 b:2", []),
    ],
)
def test_sources_with_weights(text: str, expected: list[tuple[str, str]]) -> None:
    assert sources_of(text) == expected

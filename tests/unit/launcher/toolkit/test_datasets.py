"""Data sets from a path or hub id, and their classes."""

from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from shardlaunch import UserError
from shardlaunch.data import class_names, load_splits


def _splits(train: list[Any], held_out: list[Any]) -> dict[str, Any]:
    return {
        "train": datasets.Dataset.from_dict({"label": train}),
        "eval": datasets.Dataset.from_dict({"label": held_out}),
    }


def test_splits_may_differ_in_columns_that_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "odd [name]"
    folder.mkdir()
    pd.DataFrame({"id": [1, 2], "text": ["a", "b"]}).to_csv(folder / "train.csv")
    pd.DataFrame({"text": ["c"]}).to_csv(folder / "test.csv")
    splits = load_splits(str(folder), seed=0)
    assert (splits["train"]["text"][:], splits["eval"]["text"][:]) == (["a", "b"], ["c"])


def test_a_hub_id_may_name_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def mock_hub(*words: Any) -> Any:
        asked.append(words)
        return _splits([0, 1], [1])

    monkeypatch.setattr(datasets, "load_dataset", mock_hub)
    load_splits("owner/name:config-1", seed=0)
    load_splits("owner/name", seed=0)
    assert asked == [("owner/name", "config-1"), ("owner/name", None)]


@pytest.mark.parametrize(
    ("train", "held_out", "names", "numbers"),
    [
        ([0, 2, 1, 0], [2], ["0", "1", "2"], [0, 2, 1, 0]),
        ([5, 1, 3], [3], ["1", "3", "5"], [2, 0, 1]),
        (["dog", "cat"], ["dog"], ["cat", "dog"], [1, 0]),
        ([True, False], [True], ["0", "1"], [1, 0]),
    ],
    ids=["numbers from 0", "other numbers", "words", "truth values"],
)
def test_classes(train: list[Any], held_out: list[Any], names: list[str], numbers: list[int]) -> None:
    splits, found = class_names(_splits(train, held_out), source="here")
    assert found == names
    assert splits["train"]["label"][:] == numbers
    assert splits["eval"]["label"][:] == [numbers[train.index(held_out[0])]]


@pytest.mark.parametrize(
    ("train", "held_out", "says"),
    [
        ([0, 1], [2], "labels out of range: 2 in the eval data"),
        ([-1, 0, 1], [0], "labels out of range: -1 in the train data; labels must be text or numbers from 0"),
        (["good", "bad"], ["fair"], "'fair' in the eval data.* those of the training data are 'bad', 'good'"),
        ([[0], [0, 1]], [[1]], "column 'kind' must hold class labels"),
        ([0.0, 1.0], [1.0], "column 'kind' must hold class labels"),
        ([0, None], [0], "the train data has rows without a 'kind'"),
        ([1, 1], [1], "have the 'kind' 1; at least two classes are required"),
        ([0, 1], ["0"], "the classes differ: column 'kind'"),
    ],
    ids=str,
)
def test_what_are_no_classes(train: list[Any], held_out: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"^--data here: .*{says}"):
        class_names(_splits(train, held_out), source="here", called="kind")

"""Which samples each fold holds out."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset

from shardlaunch import Options, Recipe, TensorData, UserError
from shardlaunch.launcher.runs.cross_validation import summarize
from shardlaunch.launcher.runs.folds import checked_splits, fold_splits
from shardlaunch.launcher.splitting import fold_of_samples


@pytest.mark.parametrize("num_samples", [5, 100, 103])
def test_every_sample_is_held_out_once_by_folds_of_equal_size(num_samples: int) -> None:
    folds = fold_of_samples(num_samples, 5, seed=0, classes=None)
    sizes = np.bincount(folds, minlength=5)
    assert sizes.sum() == num_samples
    assert sizes.max() - sizes.min() <= 1


def test_each_fold_has_its_share_of_each_class() -> None:
    classes = np.repeat([0, 1, 2], [61, 30, 12])
    folds = fold_of_samples(len(classes), 4, seed=3, classes=classes)
    for number in range(3):
        shares = np.bincount(folds[classes == number], minlength=4)
        assert shares.max() - shares.min() <= 1


def test_folds_are_a_function_of_the_seed() -> None:
    one, again, other = (fold_of_samples(50, 5, seed=seed, classes=None) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def test_more_folds_than_samples() -> None:
    with pytest.raises(UserError, match="--folds 5: the training data has only 4 samples"):
        fold_of_samples(4, 5, seed=0, classes=None)


def test_any_map_style_data_set_is_divided() -> None:
    folds = np.array([0, 1, 0])
    split = fold_splits(TensorData(inputs=torch.tensor([5, 6, 7])), folds, 0)
    assert (split["train"].columns["inputs"].tolist(), split["eval"].columns["inputs"].tolist()) == ([6], [5, 7])
    split = fold_splits(["a", "b", "c"], folds, 1)
    assert isinstance(split["train"], Subset)
    assert (list(split["train"]), list(split["eval"])) == (["a", "c"], ["b"])


def test_classes_are_the_labels_if_they_are_whole_numbers() -> None:
    recipe = Recipe(Options())
    labels = recipe.classes_of(TensorData(inputs=torch.zeros(2), labels=torch.tensor([1, 0])))
    assert labels is not None
    assert labels.tolist() == [1, 0]
    assert recipe.classes_of(TensorData(labels=torch.tensor([0.5]))) is None
    assert recipe.classes_of(["a"]) is None


def test_mean_and_standard_deviation_over_folds() -> None:
    found = summarize([{"step": 3, "eval/a": 1.0, "eval/m": [[1]]}, {"step": 3, "eval/a": 2.0, "eval/m": [[3]]}])
    assert found == {"eval/a": {"mean": 1.5, "std": pytest.approx(0.5**0.5)}}


def test_the_summary_of_odd_numbers() -> None:
    """Metrics that some folds lack are omitted; an infinite perplexity does not affect the others."""
    found = summarize([{"eval/loss": 1.0, "eval/ppl": math.inf}, {"eval/loss": 3.0, "eval/ppl": 2.0, "eval/f1": 1.0}])
    assert found["eval/loss"] == {"mean": 2.0, "std": pytest.approx(math.sqrt(2))}
    assert found["eval/ppl"]["mean"] == math.inf
    assert found.keys() == {"eval/loss", "eval/ppl"}


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class _Streamed(Recipe):
    def datasets(self) -> dict[str, Any]:
        return {"train": _Stream()}


def test_data_that_is_read_in_its_own_order_only() -> None:
    with pytest.raises(UserError, match=r"the train data is a _Stream, .* --folds need a map-style data set"):
        checked_splits(_Streamed(Options(folds=2)), 0)


def test_fold_options() -> None:
    with pytest.raises(UserError, match="--folds 1"):
        Options(folds=1)
    with pytest.raises(UserError, match="--resume never: with --folds"):
        Options(folds=3, resume="never")

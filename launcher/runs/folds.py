"""The data sets of a run, a recipe's or a fold's, and which samples each fold of a cross-validation holds out."""

from typing import Any

import numpy as np
from torch.utils.data import Subset

from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.seeding import derive_seed


def checked_splits(recipe: Recipe, fold: int | None) -> dict[str, Any]:
    """Return the recipe's data sets, or a fold's. Raises UserError for what a run cannot be made of."""
    splits = dict(recipe.datasets())
    if "train" not in splits:
        raise UserError(f"the recipe's datasets() must have 'train'; it has {', '.join(splits)}")
    for name, split in splits.items():
        if not hasattr(split, "__len__") or not hasattr(split, "__getitem__"):
            raise UserError(
                f"the {name} data is a {type(split).__name__}, which is read in its own order only; a run needs a "
                f"map-style data set, with a length and rows by number"
            )
    if fold is not None:
        options, train = recipe.options, splits["train"]
        classes = recipe.classes_of(train)
        folds = fold_of_samples(len(train), options.folds, seed=options.seed, classes=classes)
        splits = fold_splits(train, folds, fold)
    for name, split in splits.items():
        if len(split) == 0:
            raise UserError(f"the {name} data has no rows")
    return splits


def fold_of_samples(num_samples: int, num_folds: int, *, seed: int, classes: np.ndarray | None) -> np.ndarray:
    """Return each sample's fold (0 to num_folds - 1), an int array: a function of the seed, of equal sizes but for one.

    With `classes` (a whole number a sample) each fold has its share of each class, to within one sample. Raises
    UserError when there are fewer samples than folds.
    """
    if num_samples < num_folds:
        raise UserError(f"--folds {num_folds}: the training data has only {num_samples} samples, fewer than folds")
    shuffled = np.random.default_rng(derive_seed(seed, "folds")).permutation(num_samples)
    if classes is not None:
        shuffled = shuffled[np.argsort(classes[shuffled], kind="stable")]
    folds = np.empty(num_samples, dtype=np.int64)
    folds[shuffled] = np.arange(num_samples) % num_folds
    return folds


def fold_splits(dataset: Any, folds: np.ndarray, fold: int) -> dict[str, Any]:
    """Return the data sets `train` and `eval` of one fold, which `eval` is."""
    held_out = folds == fold
    return {
        "train": _chosen(dataset, np.flatnonzero(~held_out)),
        "eval": _chosen(dataset, np.flatnonzero(held_out)),
    }


def _chosen(dataset: Any, rows: np.ndarray) -> Any:
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows.tolist())

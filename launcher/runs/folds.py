"""The data sets of a run or fold, and which samples each fold of a cross-validation holds out."""

from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from shardlaunch.errors import UserError
from shardlaunch.launcher.order import OrderedData
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.runs.folder import run_folder
from shardlaunch.launcher.runs.iterables import BOOKMARKS, Stream, is_stream
from shardlaunch.launcher.splitting import fold_of_samples


def checked_splits(recipe: Recipe, fold: int | None) -> dict[str, Any]:
    """Return the data sets of the recipe or fold. Raises UserError if they cannot be used for a run."""
    splits = dict(recipe.datasets())
    if "train" not in splits:
        raise UserError(f"the recipe's datasets() must have 'train'; it has {', '.join(splits)}")
    for name, split in [*splits.items()]:
        if isinstance(split, DataLoader):
            raise UserError(
                f"the {name} data is a DataLoader: return its data set (loader.dataset). Batches are made here "
                f"(--global-batch-size, --micro-batch-size, collate(), --num-workers), and what a sampler does is "
                f"--order, or order() of the recipe"
            )
        if is_stream(split) and name == "train" and fold is None:
            splits[name] = Stream(
                split, recipe.options, folder=run_folder(recipe.options, recipe_name(type(recipe))) / BOOKMARKS
            )
        elif is_stream(split) or not hasattr(split, "__len__") or not hasattr(split, "__getitem__"):
            raise UserError(
                f"the {name} data is a {type(split).__name__}, which can only be read in order; evaluations and "
                f"--folds need a map-style data set, with __len__ and __getitem__, such as "
                f"list(itertools.islice(stream, 1000))"
            )
    if fold is not None:
        if isinstance(splits["train"], OrderedData):
            raise UserError(
                "--folds: the training data is read block by block, or mixed, and has an order of its own that a part "
                "of it has not; divide its files into training and evaluation data instead"
            )
        options, train = recipe.options, splits["train"]
        classes, groups = recipe.classes_of(train), recipe.groups_of(train)
        folds = fold_of_samples(len(train), options.folds, seed=options.seed, classes=classes, groups=groups)
        splits = fold_splits(train, folds, fold)
    for name, split in splits.items():
        if len(split) == 0:
            raise UserError(f"the {name} data has no rows")
    return splits


def fold_splits(dataset: Any, folds: np.ndarray, fold: int) -> dict[str, Any]:
    """Return the data sets of one fold: `eval` has its samples, `train` all others."""
    held_out = folds == fold
    return {
        "train": _chosen(dataset, np.flatnonzero(~held_out)),
        "eval": _chosen(dataset, np.flatnonzero(held_out)),
    }


def _chosen(dataset: Any, rows: np.ndarray) -> Any:
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows.tolist())

"""Which rows are held out, a function of the seed: in equal shares of each class, and with groups kept together."""

import math
import warnings

import numpy as np

from shardlaunch.errors import UserError
from shardlaunch.launcher.seeding import derive_seed

HELD_OUT_FRACTION = 0.1
HELD_OUT_PARTS = round(1 / HELD_OUT_FRACTION)
MAX_SKLEARN_SEED = 2**32


def fold_of_samples(
    num_samples: int, num_folds: int, *, seed: int, classes: np.ndarray | None, groups: np.ndarray | None = None
) -> np.ndarray:
    """Return each sample's fold (int64 array, from 0), a function of the seed. Fold sizes differ by at most 1.

    With `classes` (one integer per sample) the folds are stratified: counts of each class differ by at most 1. With
    `groups` (one integer per sample) the samples of a group are in one fold, and sizes and shares are as equal as
    scikit-learn's StratifiedGroupKFold or GroupKFold makes them. Raises UserError if there are fewer samples, or
    groups, than folds.
    """
    if num_samples < num_folds:
        raise UserError(f"--folds {num_folds}: the training data has only {num_samples} samples; use fewer folds")
    if groups is not None:
        num_groups = len(np.unique(groups))
        if num_groups < num_folds:
            raise UserError(f"--folds {num_folds}: --group-column has only {num_groups} groups; use fewer folds")
        return _grouped_folds(groups, num_folds, classes=classes, seed=derive_seed(seed, "folds"))
    shuffled = np.random.default_rng(derive_seed(seed, "folds")).permutation(num_samples)
    if classes is not None:
        shuffled = shuffled[np.argsort(classes[shuffled], kind="stable")]
    folds = np.empty(num_samples, dtype=np.int64)
    folds[shuffled] = np.arange(num_samples) % num_folds
    return folds


def _grouped_folds(groups: np.ndarray, num_folds: int, *, classes: np.ndarray | None, seed: int) -> np.ndarray:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    seed %= MAX_SKLEARN_SEED
    # scikit-learn refuses to stratify by classes that all have fewer samples than there are folds.
    is_stratified = classes is not None and np.bincount(np.unique(classes, return_inverse=True)[1]).max() >= num_folds
    splitter = (StratifiedGroupKFold if is_stratified else GroupKFold)(num_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(groups), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer samples than there are folds
        for number, (_, held_out) in enumerate(splitter.split(groups, classes, groups)):
            folds[held_out] = number
    return folds


def held_out_rows(
    num_rows: int, *, seed: int, classes: np.ndarray | None = None, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and a held-out tenth of them, a function of the seed.

    With `classes` (one integer per row) each class has its share in both, and none is held out as a whole: a class of
    one row is only trained on. With `groups` (one integer per row) the rows of a group stay together. Raises UserError
    if there are too few groups.
    """
    if classes is None and groups is None:
        order = np.random.default_rng(seed).permutation(num_rows)  # as `train_test_split` of the datasets library
        num_held_out = math.ceil(HELD_OUT_FRACTION * num_rows)
        return order[num_held_out:], order[:num_held_out]
    if groups is not None:
        is_held_out = _held_out_groups(groups, classes, seed=seed)
    else:
        assert classes is not None
        is_held_out = _held_out_of_classes(classes, seed=seed)
    order = np.random.default_rng(derive_seed(seed, "held out")).permutation(num_rows)
    return order[~is_held_out[order]], order[is_held_out[order]]


def _held_out_of_classes(classes: np.ndarray, *, seed: int) -> np.ndarray:
    numbers = np.unique(classes, return_inverse=True)[1]
    (several,) = np.nonzero(np.bincount(numbers)[numbers] > 1)
    if not len(several):
        raise UserError(
            f"none of the {len(classes)} training rows can be held out: each is the only one of its class. Choose "
            f"another column, or give evaluation data of its own, in a file whose name starts with eval"
        )
    num_parts = min(HELD_OUT_PARTS, len(several))
    is_held_out = np.zeros(len(classes), dtype=bool)
    folds = fold_of_samples(len(several), num_parts, seed=seed, classes=numbers[several])
    is_held_out[several[folds == 0]] = True
    return is_held_out


def _held_out_groups(groups: np.ndarray, classes: np.ndarray | None, *, seed: int) -> np.ndarray:
    from sklearn.model_selection import GroupShuffleSplit

    is_free = np.ones(len(groups), dtype=bool)
    if classes is not None:  # a group that has all rows of a class is trained on
        for number in np.unique(classes):
            of_class = np.unique(groups[classes == number])
            if len(of_class) == 1:
                is_free &= groups != of_class[0]
    (free,) = np.nonzero(is_free)
    num_groups, num_free = len(np.unique(groups)), len(np.unique(groups[free]))
    if num_groups < 2 or not num_free:
        raise UserError(
            f"--group-column: of {num_groups} groups none can be held out without a whole class; give evaluation data "
            f"of its own, in a file whose name starts with eval"
        )
    is_held_out = np.zeros(len(groups), dtype=bool)
    if num_free == 1:
        is_held_out[free] = True
    elif classes is None:
        splitter = GroupShuffleSplit(1, test_size=HELD_OUT_FRACTION, random_state=seed % MAX_SKLEARN_SEED)
        _, held_out = next(iter(splitter.split(free, groups=groups[free])))
        is_held_out[free[held_out]] = True
    else:
        num_parts = min(HELD_OUT_PARTS, num_free)
        folds = _grouped_folds(groups[free], num_parts, classes=classes[free], seed=derive_seed(seed, "held out"))
        is_held_out[free[folds == 0]] = True
        _return_whole_classes(is_held_out, groups, classes)
    return is_held_out


def _return_whole_classes(is_held_out: np.ndarray, groups: np.ndarray, classes: np.ndarray) -> None:
    """Give back a group of each class that is held out as a whole."""
    for number in np.unique(classes):
        of_class = classes == number
        if is_held_out[of_class].all():
            is_held_out[groups == groups[of_class][0]] = False

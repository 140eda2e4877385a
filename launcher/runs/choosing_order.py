"""Choose the order of the training samples: the recipe's own, or that of --order."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.order import Order, OrderedData
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.seeding import derive_seed, seeded
from shardlaunch.launcher.training import orders
from shardlaunch.launcher.training.block_orders import BlockOrder

_INSTEAD: Mapping[str, str] = {
    "WeightedRandomSampler": "orders.weighted(weights)",
    "SequentialSampler": "orders.sequential(len(dataset)), or --order sequential",
    "RandomSampler": "no order() at all, or orders.weighted(np.ones(len(dataset)), num_samples=...) with replacement",
    "SubsetRandomSampler": "a smaller data set: torch.utils.data.Subset",
    "DistributedSampler": "no order() at all: ranks divide what there is",
}
"""What stands here for samplers of torch."""


def chosen_order(recipe: Recipe, dataset: Any) -> Order | None:
    """Return the order of the training data, None for the usual shuffle. Raises UserError for one that is none."""
    options = recipe.options
    with seeded(derive_seed(options.seed, "data")):
        found = _of_recipe(recipe, dataset)
    if found is None:
        return _of_options(recipe, options, dataset)
    if options.order != "shuffled":
        raise UserError(f"--order {options.order}: has no effect, because this recipe has its own order(); remove it")
    _check_unused(options)
    _check_kind(found)
    order: Order = found
    _check(order, options, dataset)
    return order


def _of_recipe(recipe: Recipe, dataset: Any) -> Any:
    hook = type(recipe).order
    try:
        signature(hook).bind(recipe, dataset)
    except TypeError:
        raise UserError(
            f"the recipe's `order` must be a method that takes the training data, order(dataset), and returns an order "
            f"of samples; it is {hook!r}"
        ) from None
    return hook(recipe, dataset)


def _of_options(recipe: Recipe, options: Options, dataset: Any) -> Order | None:
    count = options.samples_per_epoch or len(dataset)
    match options.order:
        case "sequential":
            _check_unused(options)
            found = orders.sequential(len(dataset))
        case "weighted":
            _check_unused(options, may_be="samples_per_epoch")
            weights = _each(recipe.weights_of, dataset)
            if weights is None:
                raise UserError("--order weighted: needs a column `weight`, or a recipe with weights_of(dataset)")
            found = orders.weighted(weights, num_samples=count)
        case "balanced":
            _check_unused(options, may_be="samples_per_epoch")
            found = orders.balanced(_classes(recipe, options, dataset), num_samples=count)
        case "per-class":
            each = options.samples_per_class
            if not each or options.micro_batch_size % each:
                raise UserError(
                    f"--order per-class: needs --samples-per-class, a divisor of --micro-batch-size "
                    f"{options.micro_batch_size}, not {each}"
                )
            found = orders.per_class(
                _classes(recipe, options, dataset),
                num_classes=options.micro_batch_size // each,
                samples_per_class=each,
                num_samples=count,
            )
        case _:
            _check_unused(options)
            return _of_data(options, dataset)
    _check(found, options, dataset)
    return found


def _of_data(options: Options, dataset: Any) -> Order | None:
    """Return the shuffled order of the data itself, if it has one. Raises UserError for a part of such data."""
    if not hasattr(dataset, "parts_at"):
        _check_no_weights(options, "the data is no mixture of sources")
    if isinstance(dataset, OrderedData):
        return dataset.shuffled_order(options)
    if options.shuffle_window:
        raise UserError("--shuffle-window: has no effect, because the data is not read block by block; remove it")
    inner = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    if isinstance(inner, OrderedData):
        raise UserError(
            "the training data is a Subset of data that is read block by block, or mixed, whose order it does not "
            "have: divide the files instead (train-*.parquet and eval-*.parquet), or mix the Subsets"
        )
    return None


def _check_no_weights(options: Options, why: str) -> None:
    if options.data_weights:
        raise UserError(f"--data-weights: has no effect, because {why}; remove it")


def _check_blocks(dataset: Any, order: Order, options: Options) -> None:
    """Warn of another order than its own for data that is read block by block, unless it is sequential."""
    _check_no_weights(options, f"samples come in another order ({getattr(order, 'name', 'the recipe has its own')})")
    if options.shuffle_window:
        raise UserError("--shuffle-window: has no effect with this order of samples; remove it")
    is_near = isinstance(order, BlockOrder) or getattr(order, "name", "") == "sequential"
    if getattr(dataset, "has_blocks", False) and not is_near:
        current().warnings.append(
            "the training data is read block by block, but its samples come in an order that takes them from anywhere, "
            "so that each may cost the reading of a block; --order shuffled with --shuffle-window does not"
        )


def _check_unused(options: Options, may_be: str = "") -> None:
    for name, text in (("samples_per_epoch", "--samples-per-epoch"), ("samples_per_class", "--samples-per-class")):
        if getattr(options, name) and name != may_be:
            raise UserError(f"{text}: has no effect with this order of samples (--order {options.order}); remove it")


def _classes(recipe: Recipe, options: Options, dataset: Any) -> np.ndarray:
    classes = _each(recipe.classes_of, dataset)
    if classes is None:
        raise UserError(
            f"--order {options.order}: needs classes, a column `labels` or `label` of whole numbers, or a recipe with "
            f"classes_of(dataset)"
        )
    return classes


def _each(of: Any, dataset: Any) -> np.ndarray | None:
    """Return what a recipe's method says of each sample, also of a part of a data set."""
    found = of_parts(of, dataset)
    if found is None and isinstance(dataset, Subset):
        found = _each(of, dataset.dataset)
        return None if found is None else found[np.asarray(dataset.indices)]
    return found


def of_parts(of: Any, dataset: Any) -> np.ndarray | None:
    """Return what a recipe's method says of each sample of a data set, or of the data sets that it is a mixture of."""
    if not hasattr(dataset, "parts_at"):
        found = of(dataset)
        return None if found is None else np.asarray(found)
    each = [of_parts(of, part) for part in dataset.parts]
    known = [one for one in each if one is not None]
    return np.concatenate(known) if len(known) == len(each) else None


def _check_kind(found: Any) -> None:
    """Raise UserError for a sampler of torch, a loader, a function or an array instead of an order."""
    if isinstance(found, torch.utils.data.DataLoader):
        found = found.batch_sampler
    kind = type(found).__name__
    if isinstance(found, torch.utils.data.Sampler) or (hasattr(found, "__iter__") and not hasattr(found, "samples")):
        instead = _INSTEAD.get(kind, "orders.own(lambda seed, epoch: indices, num_samples=...)")
        raise UserError(
            f"the recipe's order() returned a {kind}, whose samples can only be taken in turn, so that a resume and "
            f"other ranks would have others. Return an order, a function of seed and epoch: here {instead} "
            f"(from shardlaunch import orders)"
        )
    if not isinstance(found, Order):
        hint = "orders.own(function, num_samples=...)" if callable(found) else "orders.weighted(...) and the like"
        raise UserError(
            f"the recipe's order() must return an order, with num_samples and samples(seed, epoch, positions), or "
            f"None; it returned a {kind}. See {hint} (from shardlaunch import orders)"
        )


def _check(found: Order, options: Options, dataset: Any) -> None:
    """Raise UserError for an order that does not fit data or options, or is no function of seed and epoch."""
    _check_blocks(dataset, found, options)
    count = found.num_samples
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise UserError(f"the recipe's order: num_samples must be a whole number from 1, not {count!r}")
    expected = getattr(found, "num_in_data", len(dataset))
    if expected != len(dataset):
        raise UserError(
            f"the recipe's order is for {expected:,} samples, but the training data has {len(dataset):,}: weights, "
            f"classes and the like must have one entry per sample"
        )
    group = getattr(found, "group_size", 1)
    if options.micro_batch_size % group:
        raise UserError(
            f"the recipe's order has groups of {group} samples, of which --micro-batch-size "
            f"{options.micro_batch_size} is no multiple: a group would be divided"
        )

"""The data of a run, the plan of its batches, and the number of steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardlaunch.errors import UserError
from shardlaunch.launcher.optimization.schedules import require_extendable
from shardlaunch.launcher.options import flag
from shardlaunch.launcher.order import OrderedData
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.runs.choosing_order import chosen_order, of_parts
from shardlaunch.launcher.runs.folds import checked_splits
from shardlaunch.launcher.runs.second_look import check_second_look
from shardlaunch.launcher.seeding import derive_seed, seeded
from shardlaunch.launcher.training.batch_plan import BatchPlan, EvaluationPlan
from shardlaunch.launcher.training.batches import Batches
from shardlaunch.launcher.training.clock import Clock
from shardlaunch.launcher.training.former_order import FormerPlan
from shardlaunch.launcher.training.ordered_plan import OrderedPlan
from shardlaunch.sharding.world import World


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Data sets of a run and the plan of its batches.

    Schedule and identity of the run depend on `num_steps`; a run that is extended continues to `last_step`.
    """

    splits: Mapping[str, Any]
    plan: BatchPlan
    num_steps: int
    last_step: int

    def extended_to(self, step: int) -> int:
        """Return the last step of a run that is extended, and has come to a step; 0 of one that is not."""
        last_step = max(self.last_step, step)
        return last_step if last_step > self.num_steps else 0

    def steps_text(self, step: int) -> str:
        """Return the number of steps of a run that has come to a step."""
        extended_to = self.extended_to(step)
        return f"{self.num_steps}" + (f", extended to {extended_to}" if extended_to else "")

    @property
    def is_in_former_order(self) -> bool:
        return isinstance(self.plan, FormerPlan)

    def in_former_order(self) -> "RunData":
        """Return the same data in the order of runs that began before the order had a version."""
        plan = self.plan
        former = FormerPlan(
            num_samples=plan.num_samples,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            seed=plan.seed,
            lengths=plan.lengths,
        )
        return replace(self, plan=former)

    def former_digest(self) -> str:
        """Return the digest of the former order, which runs with a chosen order or with equal work never had."""
        is_newer = isinstance(self.plan, OrderedPlan) or self.plan.equal_work
        plan = self.plan if is_newer else self.in_former_order().plan
        return plan.digest()

    def clock(self, recipe: Recipe) -> Clock:
        """Return what tells the recipe where the run is."""
        return Clock(recipe=recipe, steps_per_epoch=self.plan.steps_per_epoch, num_steps=self.num_steps)

    def training_batches(self, recipe: Recipe, world: World) -> Batches:
        """Return this rank's batches of the training data."""
        return _batches(recipe, world, self.splits["train"], self.plan, clock=self.clock(recipe))

    def evaluation_batches(self, recipe: Recipe, world: World) -> Batches | None:
        """Return this rank's batches of the evaluation data, None if there is none."""
        if "eval" not in self.splits:
            return None
        split, options = self.splits["eval"], recipe.options
        size = options.eval_micro_batch_size or options.micro_batch_size
        plan = EvaluationPlan(
            num_samples=len(split),
            global_batch_size=size * options.micro_batches,  # as many micro-batches for the ranks as in training
            micro_batch_size=size,
            seed=options.seed,
            # Not of data that is read block by block: a sorted order would need a million samples at a time.
            lengths=None if getattr(split, "has_blocks", False) else _lengths(recipe, split),
        )
        return _batches(recipe, world, split, plan)


def load_data(recipe: Recipe, world: World, fold: int | None) -> RunData:
    """Return the data of the recipe or fold, and the plan of the run. All ranks; rank 0 loads first.

    Raises UserError for unsuitable data, and for options that do not fit the number of steps.
    """
    options = recipe.options

    def load() -> dict[str, Any]:
        with seeded(derive_seed(options.seed, "data")):  # for random_split() and the like
            return checked_splits(recipe, fold)

    splits = world.main_first(load)
    for name, split in splits.items():
        check_second_look(split, name, seed=options.seed)
    plan = world.peers.together(lambda: _training_plan(recipe, splits["train"]))
    num_steps = options.max_steps or options.epochs * plan.steps_per_epoch
    for name in ("unfreeze_at_step", "warmup_steps"):
        if getattr(options, name) >= num_steps:
            raise UserError(f"{flag(name)} {getattr(options, name)}: must be less than the run's {num_steps} steps")
    if options.extend_to_steps:
        has_own_schedule = type(recipe).schedule is not Recipe.schedule
        require_extendable(options, num_steps, options.extend_to_steps, has_own_schedule=has_own_schedule)
    return RunData(splits=splits, plan=plan, num_steps=num_steps, last_step=options.extend_to_steps or num_steps)


def _training_plan(recipe: Recipe, split: Any) -> BatchPlan:
    """Return the plan of the training data. Raises UserError for lengths and orders that do not fit."""
    options, order = recipe.options, chosen_order(recipe, split)
    fixes_batches = order is not None and getattr(order, "fixes_batches", False)
    lengths = None if fixes_batches else _lengths(recipe, split)
    if options.equal_work and lengths is None:
        why = "the order of this run fixes micro-batches" if fixes_batches else "the recipe has no lengths() of samples"
        raise UserError(f"--equal-work: {why}; remove the option")
    sizes = {"global_batch_size": options.global_batch_size, "micro_batch_size": options.micro_batch_size}
    if order is None:
        return BatchPlan(
            num_samples=len(split), seed=options.seed, lengths=lengths, equal_work=options.equal_work, **sizes
        )
    plan = OrderedPlan(
        num_samples=int(order.num_samples),
        num_in_data=len(split),
        chosen=order,
        seed=options.seed,
        lengths=lengths,
        equal_work=options.equal_work,
        **sizes,
    )
    if isinstance(split, OrderedData):
        split.hold_samples(order, 1 if lengths is None else plan.block(0)[1])
    plan.check()
    return plan


def _lengths(recipe: Recipe, split: Any) -> np.ndarray | None:
    """Return the recipe's lengths, which are read in the course of the run. Raises UserError if they do not fit."""
    found = of_parts(recipe.lengths, split)
    if found is None:
        return None
    if found.shape != (len(split),) or found.dtype.kind not in "biuf":
        raise UserError(
            f"the recipe's lengths() must return one number per sample, for {len(split):,} samples; it returned "
            f"{found.dtype} of shape {found.shape}"
        )
    return found


def _batches(recipe: Recipe, world: World, dataset: Any, plan: BatchPlan, *, clock: Clock | None = None) -> Batches:
    """Return batches for training, which has a clock, or for evaluation."""
    return Batches(
        dataset,
        plan,
        collate=recipe.collate,
        num_targets=recipe.num_targets,
        num_tokens=recipe.num_tokens,
        rank=world.data_rank,
        num_ranks=world.num_data_ranks,
        training=clock is not None,
        num_workers=recipe.options.num_workers,
        clock=clock,
    )

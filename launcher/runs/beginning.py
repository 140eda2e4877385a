"""The first lines of a run."""

from dataclasses import replace
from pathlib import Path

import torch

from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.errors import some
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.notes import Notes
from shardlaunch.launcher.reporting.summary import batch_text, say_init, say_start
from shardlaunch.launcher.runs.assembly import Assembly
from shardlaunch.launcher.runs.choosing_order import of_parts
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.preflight import bytes_text
from shardlaunch.launcher.training.ordered_plan import OrderedPlan
from shardlaunch.sharding.layers import with_sparse_gradients
from shardlaunch.sharding.strategy import Strategy
from shardlaunch.sharding.world import World

LEAST_SAID = 0.05  # of the first weights in an average at the end
LEAST_WAITING = 0.1  # of a step, that ranks need not wait


def show_start(
    display: Display,
    recipe: Recipe,
    data: RunData,
    assembly: Assembly,
    *,
    name: str,
    world: World,
    strategy_name: str,
    precision_name: str,
    steps: str,
    fold: int | None,
    notes: Notes,
    checkpoint: Checkpoint | None,
    init: InitFrom | None,
    output_dir: Path,
) -> None:
    """Print what the run is, where it starts, and where its weights come from. All ranks; rank 0 prints."""
    for text in notes.warnings:  # about the data
        display.warn(text)
    options, plan, strategy = recipe.options, data.plan, assembly.strategy
    new = [] if checkpoint else assembly.origins.new
    num_new = "" if checkpoint else f", {len(new)} of {assembly.num_tensors} tensors newly initialized"
    say_start(
        display,
        {
            "recipe": f"{name} ({type(recipe).__name__}), {assembly.model_class}",
            "parameters": f"{assembly.num_elements:,}{num_new}",
            **({"adapters": assembly.adapters.describe()} if assembly.adapters is not None else {}),
            "ranks": f"{world.size} x {_device_name(world)}, threads per rank: {torch.get_num_threads()}",
            "strategy": ": ".join(filter(None, (strategy_name, strategy.describe()))),
            "precision": precision_name,
            **_average_row(recipe, data, strategy),
            "global batch": batch_text(
                global_batch=options.global_batch_size,
                micro_batch=options.micro_batch_size,
                ranks=world.num_data_ranks,
                replicas=world.num_data_ranks * len(strategy.replicas),
                model_ranks=world.model_ranks,
            )
            + balance_text(data, world),
            "steps": f"{steps} ({plan.steps_per_epoch} per epoch, {plan.num_samples:,} samples)",
            **({"order": plan.digest().partition(" ")[0]} if isinstance(plan, OrderedPlan) else {}),
            **({"fold": f"{fold + 1} of {options.folds}"} if fold is not None else {}),
            **_data_rows(recipe, data, notes, fold=fold),
            "starts at": f"step {checkpoint.step} ({checkpoint.step_dir})" if checkpoint else "step 0",
            "output": str(output_dir),
        },
        new=new,
        num_tensors=assembly.num_tensors,
        origins=[] if checkpoint or init is not None else assembly.origins.rows(),
    )
    left = options.part_of_first(data.num_steps, options.global_batch_size)
    if left > LEAST_SAID and checkpoint is None:
        display.warn(
            f"at the end of {data.num_steps:,} steps, {left:.0%} of the average will still be the weights of the first "
            f"step; a smaller {'--ema-half-life' if options.ema_half_life else '--ema'} forgets them sooner"
        )
    if assembly.origins.stale and checkpoint is None:
        display.warn(
            f"the constructor copied values that weights() has replaced since: {some(assembly.origins.stale)}; "
            f"return these from weights() too, or load the pretrained weights in model() before the copy"
        )
    if (adapters := assembly.adapters) is not None and adapters.narrow_layers and checkpoint is None:
        display.warn(
            f"--lora-rank {options.lora_rank}: more than the smaller dimension of {some(adapters.narrow_layers)}; what "
            f"is above it adds parameters, and nothing that they could learn. Choose a smaller rank, or name other "
            f"layers with --lora-targets"
        )
    if sparse := with_sparse_gradients(assembly.model):
        display.warn(
            f"the sparse gradients of {some(sparse)} are added up as dense ones, and each step updates all rows, by "
            f"weight decay and momentum also those that no sample has; sparse=False computes the same"
        )
    if assembly.whole_model_because and world.size > 1:
        display.say(
            f"{assembly.whole_model_on} held the whole model while this run started: {assembly.whole_model_because}"
        )
    if init is not None and init.match is not None and checkpoint is None:
        match = init.match
        say_init(
            display,
            str(init.weights.source),
            match.rows(),
            other_shapes=match.other_shapes,
            unused=match.unused,
            renaming=match.renaming,
        )
    if any(row.lr is None for row in assembly.rows) or options.lr_factors:
        display.parameters(assembly.rows)


def balance_text(data: RunData, world: World) -> str:
    """Return whether micro-batches have equal work or, if ranks wait for each other otherwise, for how long."""
    plan, ranks = data.plan, world.num_data_ranks
    if plan.equal_work:
        return ", equal work"
    if ranks == 1 or plan.lengths is None or data.is_in_former_order or not world.is_main:
        return ""
    now, then = plan.waiting(ranks), replace(plan, equal_work=True).waiting(ranks)
    if now - then < LEAST_WAITING:
        return ""
    return f"; ranks wait {now:.0%} of a step for longer samples ({then:.0%} with --equal-work)"


def _average_row(recipe: Recipe, data: RunData, strategy: Strategy) -> dict[str, str]:
    """Return what average of the weights the run keeps, and what it takes on this rank."""
    if strategy.average is None:
        return {}
    num_bytes = sum(tensor.nbytes for tensor in strategy.average.tensors)
    where = "rank" if not strategy.is_sharded else "rank, sharded as the optimizer's state is"
    what = recipe.options.describe_average(data.num_steps)
    return {"average": f"{what}; {bytes_text(num_bytes)} more per {where}"}


def _data_rows(recipe: Recipe, data: RunData, notes: Notes, *, fold: int | None) -> dict[str, str]:
    """Return what was noted while the data was read."""
    splits = data.splits if recipe.class_names else {}
    found = {name: of_parts(recipe.classes_of, split) for name, split in splits.items()}
    classes = {name: numbers for name, numbers in found.items() if numbers is not None}
    return notes.rows(classes, recipe.class_names, fold=(fold + 1, recipe.options.folds) if fold is not None else None)


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"

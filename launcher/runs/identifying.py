"""What a run is known by: its options and data, and the weights that it begins with."""

from collections.abc import Callable
from pathlib import Path

import torch

from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.runs.identity import Identity, data_fingerprint, run_identity, versions
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.references import place_references
from shardlaunch.launcher.training.batch_plan import VERSION
from shardlaunch.sharding.exact_kernels import kernel_settings
from shardlaunch.sharding.world import World


def identify(
    name: str,
    recipe: Recipe,
    data: RunData,
    *,
    world: World,
    precision_name: str,
    fold: int | None,
    warn: Callable[[str], None],
) -> tuple[InitFrom | None, Identity]:
    """Return the weights of --init-from, if given, and the identity of the run; build its reference models. All ranks.

    Raises UserError.
    """
    options = recipe.options
    init = None
    init_digest = 0
    if options.init_from:
        with phase("reading the weights of --init-from"):
            opened = init = world.peers.together(lambda: InitFrom.opened(Path(options.init_from), warn=warn))
            # Rank 0 only: weights may be large, and the built models are compared later.
            digest = world.peers.together(lambda: opened.weights.digest() if world.is_main else "0")
            (init_digest,) = world.peers.of_first([int(digest, 16) >> 65])
    references = place_references(recipe, world)
    identity = run_identity(
        name,
        options,
        num_steps=data.num_steps,
        data={name: data_fingerprint(split, seed=options.seed) for name, split in data.splits.items()},
        order=f"version {VERSION}, {data.plan.digest()}",
        former_digest=data.former_digest,
        fold=fold,
        init_digest=f"{init_digest:016x}" if init_digest else None,
        references=references,
        in_effect={
            "--precision": precision_name,
            "--threads-per-rank": torch.get_num_threads(),
            "device": world.device.type,
            "torch": versions()["torch"],
            **({"kernels": kernel_settings(world.device)} if options.exact else {}),
        },
    )
    return init, identity

"""Models that a recipe uses and does not train: teachers, reference models. Each rank keeps them whole."""

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.seeding import derive_seed, seeded
from shardlaunch.sharding.buffers import non_persistent_buffers
from shardlaunch.sharding.world import World


def place_references(recipe: Recipe, world: World) -> dict[str, str]:
    """Build the recipe's reference models on this rank's device, and return a digest of each by name. All ranks.

    They are put into evaluation mode and need no gradient. Raises UserError for what is no model, and if ranks differ.
    """
    if type(recipe).references is Recipe.references:
        return {}
    with phase("building the reference models"):
        models = world.peers.together(lambda: _built(recipe))
        digests = {name: _digest(model) for name, model in models.items()}
        mine = xxhash.xxh3_64_intdigest(repr(digests).encode()) >> 1
        (first,) = world.peers.of_first([mine])

        def check() -> None:
            if mine != first:
                raise UserError(
                    f"rank {world.rank} has other reference models than rank 0: what references() of the recipe "
                    f"returns must not depend on the rank, nor on randomness without a seed"
                )

        world.peers.together(check)
        recipe.reference = {name: model.to(world.device) for name, model in models.items()}
    return digests


def _built(recipe: Recipe) -> dict[str, nn.Module]:
    with seeded(derive_seed(recipe.options.seed, "model")):  # model() draws the same here as for the run
        models: Any = recipe.references()
    wrong = (
        [f"{name!r}: {type(model).__name__}" for name, model in models.items() if not isinstance(model, nn.Module)]
        if isinstance(models, Mapping)
        else [type(models).__name__]
    )
    if wrong:
        raise UserError(f"the recipe's references() must return torch modules by name; it returned {some(wrong)}")
    for model in models.values():
        model.eval().requires_grad_(False)
    return dict(models)


def _digest(model: nn.Module) -> str:
    digest = xxhash.xxh3_64()
    for name, tensor in sorted({**model.state_dict(), **non_persistent_buffers(model)}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_references(recipe: Recipe, model: nn.Module, num_replicas: int) -> None:
    """Raise UserError if a reference model shares parameters with the trained one, or cannot be where it is used."""
    trained = {id(parameter): name for name, parameter in model.named_parameters()}
    for reference_name, reference in recipe.reference.items():
        shared = [trained[id(each)] for each in reference.parameters() if id(each) in trained]
        if shared:
            raise UserError(
                f"the reference model {reference_name!r} has parameters of the trained model: {some(shared)}. Build it "
                f"anew in references(), or copy it"
            )
    if recipe.reference and num_replicas > 1:
        raise UserError("references(): not under dp on several GPUs; use --strategy ddp")

"""Weights at the start of a run: pretrained ones by name, fresh ones by (seed, module name), for any strategy alike."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.seeding import derive_seed
from shardlaunch.sharding.whole_state import some


def build_model(recipe: Recipe, seed: int) -> tuple[nn.Module, list[str]]:
    """Return the recipe's model on the CPU in fp32, its weights set, and the names of the parameters that start fresh.

    The same on every rank. Raises UserError when pretrained weights do not fit the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "model"))
        model = recipe.model().float()
        weights = recipe.weights()
        fresh = [name for name, _ in model.named_parameters() if name not in weights]
        initialise(model, fresh, seed)
    load_weights(model, weights)
    return model, fresh


def initialise(model: nn.Module, fresh: list[str], seed: int) -> None:
    """Initialise every module that has fresh parameters, children first, seeded by (seed, the module's name).

    A module is initialised by its Hugging Face model's rule, else by its own `reset_parameters`; a module with neither
    keeps what its constructor, called under a seed of its own, gave it.
    """
    modules = dict(model.named_modules())
    for name in sorted(modules, key=lambda name: (-name.count(".") if name else 1, name)):
        prefix = f"{name}." if name else ""
        if any(parameter.startswith(prefix) for parameter in fresh):
            reset = _initialiser(modules, name)
            if reset is not None:
                torch.default_generator.manual_seed(derive_seed(seed, name))
                reset()


def _initialiser(modules: Mapping[str, nn.Module], name: str) -> Callable[[], object] | None:
    module = modules[name]
    owner = name
    while True:
        if hasattr(modules[owner], "_init_weights"):
            init_weights: Callable[[nn.Module], object] = modules[owner]._init_weights  # type: ignore[assignment]
            return lambda: init_weights(module)
        if not owner:
            break
        owner = owner.rpartition(".")[0]
    for method in ("reset_parameters", "_reset_parameters"):
        if hasattr(module, method):
            found: Callable[[], object] = getattr(module, method)
            return found
    return None


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into parameters and persistent buffers. Raises UserError for names or shapes that do not fit."""
    targets = model.state_dict(keep_vars=True)
    wrong = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in weights.items()
        if name not in targets or targets[name].shape != tensor.shape
    ]
    if wrong:
        raise UserError(f"pretrained weights do not fit the model: {some(wrong)}")
    for name, tensor in weights.items():
        targets[name].copy_(tensor)

"""Weights at the start of a run, the same on every rank: pretrained ones by name, new ones by the seed."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.seeding import derive_seed
from shardlaunch.sharding.buffers import non_persistent_buffers


def build_model(
    recipe: Recipe, seed: int, *, is_resumed: bool, init: InitFrom | None = None
) -> tuple[nn.Module, list[str]]:
    """Return the recipe's model on the CPU in fp32, its weights set, and the names of newly initialized parameters.

    The same on every rank. A resumed run gets its weights from the checkpoint, so that pretrained ones are not fetched;
    nor are they where `init` has a value for every tensor. Raises UserError when weights do not fit the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "model"))
        model = recipe.model().float()
        given = init.find(model) if init is not None and not is_resumed else set()
        weights = {} if is_resumed or given >= model.state_dict().keys() else recipe.weights()
        new = [name for name, _ in model.named_parameters() if name not in weights and name not in given]
        initialise(model, new, seed)
    load_weights(model, weights)
    if init is not None and given:
        init.load(model)
    return model, new


def build_empty_model(recipe: Recipe, seed: int) -> nn.Module:
    """Return the recipe's model with its parameters on the meta device, without values; its buffers are as built.

    Raises UserError when the model's constructor needs the values.
    """
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        torch.default_generator.manual_seed(derive_seed(seed, "model"))
        try:
            model = recipe.model().float()
        except (NotImplementedError, RuntimeError) as error:
            if not str(error):
                raise
            raise UserError(
                f"the recipe's model() cannot be built with its parameters on the meta device, without values, as a "
                f"model to be sliced is: {str(error).splitlines()[0]}. It may create and initialise parameters, not "
                f"read them or set their data; values of your own come from weights(). Or use --strategy ddp"
            ) from error
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise UserError(
            f"the recipe's model() computes buffers from values of parameters, which are on the meta device while a "
            f"model is built to be sliced: {some(lost)}; use --strategy ddp"
        )
    return model


def check_non_persistent_buffers(model: nn.Module, empty: nn.Module) -> None:
    """Check that the buffers outside of the state are the same, built whole or empty. Raises UserError."""
    others = non_persistent_buffers(empty)
    differing = [
        name for name, buffer in non_persistent_buffers(model).items() if not torch.equal(buffer, others[name])
    ]
    if differing:
        raise UserError(
            f"buffers that are not part of the model's state come out otherwise when the model is built to be sliced, "
            f"for its constructor draws them at random: {some(differing)}. Register them with persistent=True, draw "
            f"them from a torch.Generator of their own, or use --strategy ddp"
        )


def non_persistent_buffers_digest(model: nn.Module) -> str:
    """Return a digest of the buffers outside of the state, for a resume to compare."""
    digest = xxhash.xxh3_64()
    for name, buffer in sorted(non_persistent_buffers(model).items()):
        digest.update(name.encode())
        digest.update(buffer.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules drop each parameter's values as it is registered, so that no more than one is there at a time.

    torch.device("meta") as a context would take the buffers' values too, and nobody could tell what they were.
    """
    register = nn.Module.register_parameter
    seen = WeakIdKeyDictionary()  # a parameter that is registered twice, as tied ones are, stays one

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in seen:
                seen[param] = type(param)(param.detach().to("meta"), requires_grad=param.requires_grad)
                seen[param].__dict__.update(param.__dict__)
            param = seen[param]
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def initialise(model: nn.Module, new: list[str], seed: int) -> None:
    """Initialise the modules of Hugging Face models that have new parameters, seeded by (seed, the module's name).

    Children come first. What is outside such a model keeps what its constructor, called under the run's seed, gave it:
    an initialisation written there is the user's will.
    """
    modules = dict(model.named_modules())
    for name in sorted(modules, key=lambda name: (-name.count(".") if name else 1, name)):
        prefix = f"{name}." if name else ""
        if any(parameter.startswith(prefix) for parameter in new):
            reset = _initialiser(modules, name)
            if reset is not None:
                torch.default_generator.manual_seed(derive_seed(seed, name))
                reset()


def _initialiser(modules: Mapping[str, nn.Module], name: str) -> Callable[[], object] | None:
    """Return how to initialise a module by the rule of the nearest Hugging Face model around it, None without one."""
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    owner = name
    while not isinstance(modules[owner], PreTrainedModel):
        if not owner:
            return None
        owner = owner.rpartition(".")[0]
    model: Any = modules[owner]
    return lambda: model._init_weights(modules[name])


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

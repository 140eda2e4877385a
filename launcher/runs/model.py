"""Initial weights of a run, the same on every rank: pretrained weights by name, new weights from the seed."""

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
    """Return the recipe's model on the CPU in fp32 with its initial weights, and the names of new parameters.

    The result is the same on every rank. Pretrained weights are not loaded for a resumed run, whose weights come from
    the checkpoint, nor if `init` has all tensors. Raises UserError if weights do not fit the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "model"))
        model = recipe.model().float()
        from_init = init.find(model) if init is not None and not is_resumed else set()
        weights = {} if is_resumed or from_init >= model.state_dict().keys() else recipe.weights()
        new = [name for name, _ in model.named_parameters() if name not in weights and name not in from_init]
        initialize_modules(model, new, seed)
    load_weights(model, weights)
    if init is not None and from_init:
        init.load(model)
    return model, new


def build_empty_model(recipe: Recipe, seed: int) -> nn.Module:
    """Return the recipe's model with its parameters on the meta device (no values); its buffers have values.

    Raises UserError if the model's constructor needs values of parameters.
    """
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        torch.default_generator.manual_seed(derive_seed(seed, "model"))
        try:
            model = recipe.model().float()
        except (NotImplementedError, RuntimeError) as error:
            if not str(error):
                raise
            raise UserError(
                f"the recipe's model() cannot be built with parameters on the meta device, which this strategy "
                f"requires: {str(error).splitlines()[0]}. It may create and initialize parameters, but not read them "
                f"or set their data; return your own values from weights(), or use --strategy ddp"
            ) from error
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise UserError(
            f"the recipe's model() computes buffers from values of parameters, but this strategy builds it with "
            f"parameters on the meta device, without values: {some(lost)}; use --strategy ddp"
        )
    return model


def check_non_persistent_buffers(model: nn.Module, empty: nn.Module) -> None:
    """Check that non-persistent buffers do not depend on whether parameters have values. Raises UserError."""
    others = non_persistent_buffers(empty)
    differing = [
        name for name, buffer in non_persistent_buffers(model).items() if not torch.equal(buffer, others[name])
    ]
    if differing:
        raise UserError(
            f"non-persistent buffers differ when the model is built with parameters on the meta device, because its "
            f"constructor draws them at random: {some(differing)}. Register them with persistent=True, draw them from "
            f"a separate torch.Generator, or use --strategy ddp"
        )


def non_persistent_buffers_digest(model: nn.Module) -> str:
    """Return a digest of the non-persistent buffers, to compare on resume."""
    digest = xxhash.xxh3_64()
    for name, buffer in sorted(non_persistent_buffers(model).items()):
        digest.update(name.encode())
        digest.update(buffer.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as it is registered, so that at most one has values at a time.

    `with torch.device("meta")` would lose the values of buffers too.
    """
    register = nn.Module.register_parameter
    seen = WeakIdKeyDictionary()  # a parameter that is registered twice (tied) stays one parameter

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


def initialize_modules(model: nn.Module, new: list[str], seed: int) -> None:
    """Initialize the modules of Hugging Face models that have new parameters, seeded by (seed, module name).

    Children come first. Modules outside of such models keep the values from their constructor, which ran with the run's
    seed: the user chose that initialization.
    """
    modules = dict(model.named_modules())
    for name in sorted(modules, key=lambda name: (-name.count(".") if name else 1, name)):
        prefix = f"{name}." if name else ""
        if any(parameter.startswith(prefix) for parameter in new):
            reset = _initializer(modules, name)
            if reset is not None:
                torch.default_generator.manual_seed(derive_seed(seed, name))
                reset()


def _initializer(modules: Mapping[str, nn.Module], name: str) -> Callable[[], object] | None:
    """Return a function that initializes a module as the nearest enclosing Hugging Face model does, or None."""
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
    """Copy weights into parameters and persistent buffers. Raises UserError for unknown names and other shapes."""
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

"""Initial weights of a run, the same on every rank: pretrained weights by name, new weights from the seed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from shardlaunch.checkpoints.stored import StoredTensors, shapes_of
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES
from shardlaunch.errors import MOST_NAMED, UserError, some
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.parameters import counts_by_part
from shardlaunch.launcher.runs.drawn_weights import draw, is_loaded, recorded_draws, value_digest
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.programs import Programs
from shardlaunch.launcher.seeding import derive_seed, seed_generators, seeded
from shardlaunch.sharding.buffers import non_persistent_buffers, persistent_buffers


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the initial values of each parameter come from: parameters by name, each in one of the three."""

    pretrained: list[str] = field(default_factory=list)
    """From weights(), --init-from, or from_pretrained() in model()."""
    constructed: list[str] = field(default_factory=list)
    """As the constructor set them, or drew them at random."""
    drawn: list[str] = field(default_factory=list)
    """Drawn by (seed, name), as the Hugging Face model draws them."""
    stale: list[str] = field(default_factory=list)
    """Of the constructed: copies of values that weights() has replaced since."""

    @property
    def new(self) -> list[str]:
        """Return the parameters without pretrained values."""
        return [*self.constructed, *self.drawn]

    def rows(self) -> list[tuple[str, ...]]:
        """Return table rows if there are several origins: part of the model, numbers of tensors of each origin."""
        origins = (self.pretrained, self.constructed, self.drawn)
        return counts_by_part(origins) if sum(map(bool, origins)) > 1 else []


def build_model(
    recipe: Recipe, seed: int, *, is_resumed: bool, init: InitFrom | None = None
) -> tuple[nn.Module, Origins]:
    """Return the recipe's model on the CPU with its initial weights, and where they come from.

    The result is the same on every rank. Of a Hugging Face model, the parameters that no pretrained weights set, and
    that hold what the model itself drew, are drawn again by (seed, name); all else is kept as the constructor left it.
    Pretrained weights are not loaded for a resumed run, whose weights come from the checkpoint, nor if `init` has all
    tensors. Raises UserError if weights do not fit the model.
    """
    model_seed = derive_seed(seed, "model")
    with seeded(model_seed):
        with recorded_draws() as drawn:
            model = checked_model(recipe.model())
        from_init = init.find(model) if init is not None and not is_resumed else set()
        weights = {} if is_resumed or from_init >= model.state_dict().keys() else recipe.weights()
        check_weights(model, weights)
        origins = origins_of(model, {*weights, *from_init}, drawn.untouched(model))
        if weights and origins.constructed and any(replaced := drawn.replaced(model, weights)):
            # The constructor may have computed values from those that weights() replaces, as DoRA's magnitudes and a
            # teacher that is a copy. Built again, it computes them from the pretrained ones.
            seed_generators(model_seed)
            with recorded_draws(weights=weights, replaced=replaced):
                model = checked_model(recipe.model())
        widen(model)
        if origins.drawn:
            draw(model, set(origins.drawn), seed)
    origins.stale.extend(_stale(model, origins.constructed, weights))
    load_weights(model, weights)
    if init is not None and from_init:
        init.load(model)
    return model, origins


def origins_of(model: nn.Module, supplied: Collection[str], untouched: Collection[str]) -> Origins:
    """Return the origins of a model's parameters.

    Those of some names are `supplied` with values; others are `untouched` since a Hugging Face model drew them.
    """
    origins = Origins()
    tensors = model.state_dict(keep_vars=True)
    loaded = {id(tensors[name]) for name in supplied}  # tied ones have several names
    for name, parameter in model.named_parameters():
        is_pretrained = id(parameter) in loaded or is_loaded(parameter)
        kind = "pretrained" if is_pretrained else "drawn" if name in untouched else "constructed"
        getattr(origins, kind).append(name)
    return origins


def _stale(model: nn.Module, constructed: list[str], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the constructed parameters that equal a parameter whose value `weights` are about to replace."""
    if not constructed or not weights:
        return []
    tensors = model.state_dict(keep_vars=True)
    digests = set()
    for name, weight in weights.items():  # each may be read from a file for this
        mine = tensors[name].detach().flatten()
        if (
            not torch.equal(mine, weight.flatten().to(mine.dtype)) and (mine != mine[0]).any()
        ):  # all new norms are alike
            digests.add(value_digest(mine))
    return [name for name in constructed if value_digest(tensors[name]) in digests]


class ReadsValues(Exception):
    """A constructor that needs values of parameters, which has none on the meta device, with the reason."""


def build_empty_model(
    recipe: Recipe,
    seed: int,
    *,
    programs: Programs | None = None,
    on_built: Callable[[nn.Module], object] | None = None,
    on_whole: Callable[[str], object] | None = None,
) -> nn.Module:
    """Return the recipe's model with its parameters on the meta device (no values); its buffers have values.

    A model whose constructor needs values of parameters, as some parametrizations do, is built as a whole before it is
    emptied; `on_whole` is told why. `programs` record how the parameters get their values, which raises ReadsValues
    for such a model. `on_built` gets the model as model() returned it, before its dtypes are changed.
    """
    try:
        model = _built_without_values(recipe, seed, programs, on_built)
    except ReadsValues as error:
        if programs is not None:
            raise
        reason = str(error)
    else:
        return model
    with seeded(derive_seed(seed, "model")):
        model = checked_model(recipe.model())
        if on_built is not None:
            on_built(model)
        widen(model)
    _remove_values(model)
    if on_whole is not None:
        on_whole(reason)
    return model


def _built_without_values(
    recipe: Recipe, seed: int, programs: Programs | None, on_built: Callable[[nn.Module], object] | None
) -> nn.Module:
    with ExitStack() as stack:
        stack.enter_context(seeded(derive_seed(seed, "model")))
        stack.enter_context(_parameters_on_meta(programs))
        if programs is not None:
            stack.enter_context(programs.recording())
        try:
            model = checked_model(recipe.model())
        except (NotImplementedError, RuntimeError) as error:
            if not str(error):
                raise
            raise ReadsValues(f"the constructor needs values of parameters ({str(error).splitlines()[0]})") from error
        if on_built is not None:
            on_built(model)
        widen(model)
    lost = [name for name, buffer in model.named_buffers() if _is_on_meta(buffer)]
    if lost:
        raise ReadsValues(f"the constructor computes buffers from values of parameters: {some(lost)}")
    return model


def _remove_values(model: nn.Module) -> None:
    """Move the parameters of a model to the meta device; tied ones stay one parameter."""
    empty: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty.setdefault(id(parameter), _without_value(parameter))
                setattr(module, name, empty[id(parameter)])


def _without_value(parameter: nn.Parameter) -> nn.Parameter:
    empty = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    empty._backward_hooks = parameter._backward_hooks
    empty._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
    return empty


def check_non_persistent_buffers(found: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    """Check that non-persistent buffers do not depend on whether parameters have values. Raises UserError."""
    differing = [name for name, buffer in found.items() if not torch.equal(buffer, others[name])]
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


def _is_on_meta(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on the meta device, even if it says otherwise (see `Programs`)."""
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


@contextmanager
def _parameters_on_meta(programs: Programs | None) -> Iterator[None]:
    """Move each parameter to the meta device as it is registered, so that at most one has values at a time.

    `with torch.device("meta")` would lose the values of buffers too.
    """
    register = nn.Module.register_parameter
    seen = WeakIdKeyDictionary()  # a parameter that is registered twice (tied) stays one parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not _is_on_meta(param) and not is_lazy(param):
            if param not in seen:
                seen[param] = _without_value(param)
                if programs is not None:
                    programs.register(seen[param], param)
            param = seen[param]
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def checked_model(model: Any) -> nn.Module:
    """Return what model() returned. Raises UserError for what is not a module, or cannot be kept in a checkpoint."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the recipe's model() must return a torch module; it returned {type(model).__name__}")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise UserError(
            f"the model has layers that learn their sizes from the first batch, such as LazyLinear: {some(lazy)}; the "
            f"optimizer needs the sizes before. Give them (Linear(in_features, ...)), or call the model once on an "
            f"example batch in model()"
        )
    synced = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if synced:
        raise UserError(
            f"the model has SyncBatchNorm layers, whose statistics depend on how many ranks there are: {some(synced)}. "
            f"Use BatchNorm: its running statistics are averaged over the micro-batches of all ranks"
        )
    saved = dict(model.named_parameters()) | persistent_buffers(model)
    odd = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in saved.items()
        if tensor.dtype not in DTYPE_NAMES
    ]
    if odd:
        raise UserError(
            f"the model has tensors of a dtype that checkpoints do not hold: {some(odd)}. Keep complex numbers as real "
            f"ones (torch.view_as_real; torch.view_as_complex in forward()), others in one of "
            f"{', '.join(map(_dtype_name, DTYPE_NAMES))}, or register a buffer with persistent=False"
        )
    _refuse_shared_memory(model)
    return model


def _refuse_shared_memory(model: nn.Module) -> None:
    """Raise UserError if a parameter has memory in common with another one or a buffer.

    Updates of one would change the other, but only where parameters are whole, and as long as they stay in this memory.
    """
    by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
    with torch._C.DisableTorchFunction():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.layout != torch.strided or not tensor.numel():
                continue
            others = by_storage.setdefault(tensor.untyped_storage()._cdata, [])
            for other_name, other in others:
                if (
                    isinstance(other, nn.Parameter)
                    and other.dtype == tensor.dtype
                    and _have_common_elements(tensor, other)
                ):
                    raise UserError(
                        f"{other_name} and {name} have the same memory, but are not one parameter: under some "
                        f"strategies they would be trained apart. To tie them, assign the parameter itself "
                        f"(head.weight = embedding.weight); else give one of them a copy (.clone())"
                    )
            others.append((name, tensor))


def _have_common_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one storage have elements in common."""
    begins = [tensor.storage_offset() for tensor in (one, other)]
    lengths = [
        1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in (one, other)
    ]
    if begins[0] >= begins[1] + lengths[1] or begins[1] >= begins[0] + lengths[0]:
        return False
    is_used = torch.zeros(max(begin + length for begin, length in zip(begins, lengths, strict=True)), dtype=torch.bool)
    is_used.as_strided(one.shape, one.stride(), begins[0]).fill_(True)
    return bool(is_used.as_strided(other.shape, other.stride(), begins[1]).any())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widen(model: nn.Module) -> None:
    """Convert bf16 and fp16 parameters to fp32, exactly, and buffers of the same dtypes with them.

    Weights are trained in fp32 under every --precision. Float64 parameters and all other buffers stay as they are.
    """
    low = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < torch.float32.itemsize}
    if low:
        model._apply(lambda tensor: tensor.float() if tensor.dtype in low else tensor)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into parameters and persistent buffers of the same names and shapes."""
    targets = model.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        targets[name].copy_(tensor)


def check_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError for unknown names and other shapes than the model's."""
    is_stored = isinstance(weights, StoredTensors)
    if not isinstance(weights, Mapping) or not (
        is_stored or all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    ):
        raise UserError("the recipe's weights() must return tensors by name, such as a state_dict()")
    targets = model.state_dict(keep_vars=True)
    unknown = [name for name in weights if name not in targets]
    if unknown:
        raise UserError(
            f"weights() returns names that the model does not have: {some(_with_nearest(unknown, list(targets)))}. "
            f"Rename or remove them"
        )
    complex_ones = {} if is_stored else {name: tensor.is_complex() for name, tensor in weights.items()}
    wrong = [
        f"{name} (returned {list(shape)}, here {list(targets[name].shape)})"
        for name, shape in shapes_of(weights).items()
        if targets[name].shape != shape or (complex_ones.get(name) and not targets[name].is_complex())
    ]
    if wrong:
        raise UserError(
            f"weights() returns tensors of another shape than the model's: {some(wrong)}. Remove those that are to "
            f"start anew; to keep the rows of a table that has grown, copy them into one of the new size"
        )


def _with_nearest(unknown: list[str], targets: list[str]) -> Iterator[str]:
    """Yield each unknown name with the nearest of the model's."""
    for number, name in enumerate(unknown):
        # Comparing with all names takes time, and only the first ones are shown.
        nearest = get_close_matches(name, targets, n=1, cutoff=0.5) if number < MOST_NAMED else []
        yield f"{name} (nearest: {nearest[0]})" if nearest else name

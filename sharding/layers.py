"""Which modules of a model are gathered as a unit: its transformer blocks, found by class name."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import nn

from shardlaunch.errors import UserError, some

_CAST = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_CAST_NAMES = ("Conv1D",)  # the linear layer of GPT-2 in transformers
_PLAIN_ENDS = (nn.Embedding, nn.Linear)


def layers_to_wrap(model: nn.Module, layer_classes: Sequence[str]) -> list[nn.Module]:
    """Return the model's outermost modules of the given classes (default: those that the model declares).

    A module that shares a parameter with the rest of the model is left out: it must be gathered with the rest. Raises
    UserError for a class that the model does not have.
    """
    present = sorted({type(module).__name__ for module in model.modules()})
    absent = [name for name in layer_classes if name not in present]
    if absent:
        raise UserError(f"--layer-classes {' '.join(absent)}: no such module in the model; it has {some(present)}")
    wanted = set(layer_classes or _declared(model))
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        if name and not inside and type(module).__name__ in wanted and next(module.parameters(), None) is not None:
            layers[name] = module
    return [module for name, module in layers.items() if _shares_nothing(model, name)]


def large_ends(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the token embedding and the head of Hugging Face models, if they are larger than each of the layers.

    Gathered with the rest of the model, they would take memory while all layers run. One that is tied must be gathered
    with what it is tied to; one of a class of its own is left out, since other modules may use its weights directly.
    A head with a bias returns a view, of which an operation in place would take FSDP2's hook away.
    """
    inside = {module for layer in layers for module in layer.modules()}
    most = max(map(_num_elements, layers), default=0)
    ends = dict.fromkeys(end for module in model.modules() for end in _ends(module) if type(end) in _PLAIN_ENDS)
    return [
        end
        for name, end in model.named_modules()
        if layers
        and end in ends
        and end not in inside
        and getattr(end, "bias", None) is None
        and _num_elements(end) > most
        and _shares_nothing(model, name)
    ]


def _ends(module: nn.Module) -> Iterator[nn.Module | None]:
    """Yield what a Hugging Face model, which says which modules not to split, says is its embedding and its head."""
    if hasattr(module, "_no_split_modules"):
        for get in ("get_input_embeddings", "get_output_embeddings"):
            with suppress(AttributeError, NotImplementedError):
                yield getattr(module, get)()


def _num_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fp32_modules(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer, innermost first, whose own weights autocast may use in fp32.

    Other modules only multiply or convolve with their weights, so autocast casts those at each use. The layer itself
    comes last, if it owns such weights.
    """
    modules = [
        module
        for name, module in layer.named_modules()
        if not isinstance(module, _CAST)
        and type(module).__name__ not in _CAST_NAMES
        and next(module.parameters(recurse=False), None) is not None
        and (not name or _shares_nothing(layer, name))
    ]
    return modules[::-1]


def _shares_nothing(model: nn.Module, inner: str) -> bool:
    """Return whether no parameter of the module named `inner` is also used outside of it."""
    inside = {id(parameter) for parameter in model.get_submodule(inner).parameters()}
    names = model.named_parameters(remove_duplicate=False)
    return all(name.startswith(f"{inner}.") for name, parameter in names if id(parameter) in inside)


def _declared(model: nn.Module) -> set[str]:
    """Return the classes that Hugging Face models anywhere in the model declare in `_no_split_modules`."""
    return {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}


def with_sparse_gradients(model: nn.Module) -> list[str]:
    """Return the names of the trained embeddings with sparse gradients."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad
    ]


def refuse_sparse_gradients(model: nn.Module, who: str) -> None:
    """Raise UserError for embeddings with sparse gradients, which `who` cannot reduce."""
    if names := with_sparse_gradients(model):
        raise UserError(
            f"{who} cannot reduce the sparse gradients of {some(names)}; build with sparse=False, or use "
            f"--strategy ddp, which makes them dense"
        )


def check_gradient_hooks(model: nn.Module, replaced_by: str = "") -> None:
    """Raise UserError for hooks on the gradients of parameters that would be lost, or see what depends on the ranks.

    `replaced_by` is what replaces the parameters by its own, without their hooks.
    """
    after = [name for name, parameter in model.named_parameters() if parameter._post_accumulate_grad_hooks]
    if after:
        raise UserError(
            f"a hook sees the gradient of {some(after)} after it was added to those of a rank's earlier micro-batches "
            f"(register_post_accumulate_grad_hook), of which it depends on the ranks how many there are; "
            f"register_hook() sees the one of each micro-batch"
        )
    lost = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    if lost and replaced_by:
        raise UserError(
            f"{replaced_by} replaces parameters by shards, which have no gradient of a whole one for the hook of "
            f"{some(lost)} (register_hook). Change the gradient in the model's own backward pass, with a hook on what "
            f"forward() computes from the parameter, or use --strategy ddp"
        )


def refuse_layer_dropping(model: nn.Module, who: str) -> None:
    """Raise UserError for a model that skips layers at random, by the names that Hugging Face's give to the rates."""
    rates = {
        f"{name}={rate:g}"
        for module in model.modules()
        for holder in (module, getattr(module, "config", None))
        for name, rate in getattr(holder, "__dict__", {}).items()
        if name.endswith("layerdrop") and isinstance(rate, int | float) and rate > 0
    }
    if rates:
        raise UserError(
            f"{who} gathers layers as they run, so on several ranks it cannot train a model that skips layers at "
            f"random: {some(sorted(rates))}. Set this to 0 in its config.json, or use --strategy ddp, zero1 or zero2"
        )

"""Which modules of a model are gathered as one: its transformer blocks, found by the names of their classes."""

from collections.abc import Sequence

from torch import nn

from shardlaunch.errors import UserError, some


def layers_to_wrap(model: nn.Module, layer_classes: Sequence[str]) -> list[nn.Module]:
    """Return the model's modules of the given classes, by default those that the model declares; outer ones only.

    A module that shares a parameter with the rest of the model is left out: it must be gathered together with that
    rest. Raises UserError for a class that the model does not have.
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
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        module
        for layer, module in layers.items()
        if all(name.startswith(f"{layer}.") for p in module.parameters() for name in names[id(p)])
    ]


def _declared(model: nn.Module) -> set[str]:
    """Return the classes that Hugging Face models, anywhere in the model, declare as not to be split."""
    return {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}

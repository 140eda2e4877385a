"""The linear layers of a transformers model that do no more than to multiply by weights of their own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Layers whose weights a family's own kernels take, by the ends of their names; peft refuses out_proj.
_UNCALLED = {
    "falcon_h1": ("out_proj",),
    "falcon_mamba": ("out_proj", "dt_proj"),
    "jamba": ("dt_proj",),
    "mamba": ("out_proj", "dt_proj"),
    "mamba2": ("out_proj",),
}


def linear_layers(model: Any, whole_modules: Iterable[str]) -> list[str]:
    """Return the names of the linear layers outside of `whole_modules` that an adapter may be put beside."""
    from transformers.pytorch_utils import Conv1D

    # Their weights are used without a call of theirs, which is what an adapter adds to.
    uncalled = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    ends = _UNCALLED.get(model.config.model_type, ())
    uncalled += [name for name, _ in model.named_modules() if ends and name.endswith(ends)]
    left_out = tuple(f"{name}." for name in (*whole_modules, *uncalled))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and _returns_tensor(module)
        and not f"{name}.".startswith(left_out)
        and len(names[id(module.weight)]) == 1  # an adapter of a tied weight would be of one of its uses
    ]


def quantizable_layers(model: Any, whole_modules: Iterable[str]) -> list[str]:
    """Return the names of the linear layers that can be frozen in 8 bits: those of torch, but the output layer."""
    output_layer = model.get_output_embeddings()
    modules = {name: model.get_submodule(name) for name in linear_layers(model, whole_modules)}
    return [name for name, module in modules.items() if type(module) is nn.Linear and module is not output_layer]


def _returns_tensor(module: nn.Module) -> bool:
    """Return whether a linear layer is not one that returns more than a tensor, as routers of experts do."""
    from transformers.pytorch_utils import Conv1D

    forward: Any = type(module).forward
    known = (nn.Linear.forward, Conv1D.forward)
    return forward in known or forward.__annotations__.get("return") in (torch.Tensor, "torch.Tensor")

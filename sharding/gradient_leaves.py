"""What a strategy has made of a model's parameters and modules: for those that look into a step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def gradient_leaves(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the trained parameters by name; of those that FSDP2 shards, the gathered ones, once it has gathered them.

    They stay the same tensors from then on, and get the gradient of a micro-batch before it is summed over the ranks.
    """
    names = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            yield name, parameter
    for block in model.modules():
        group: Any = block._get_fsdp_state()._fsdp_param_group if isinstance(block, FSDPModule) else None
        for sharded in group.fsdp_params if group is not None else ():
            gathered = getattr(sharded, "_unsharded_param", None)
            if gathered is not None and gathered.requires_grad:
                yield names[id(sharded.sharded_param)], gathered


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class; not of the one that FSDP2 gives it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule)).__name__

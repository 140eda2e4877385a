"""What FSDP2 makes of a model's parameters: shards without values yet, and whole ones that have no dimension."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from shardlaunch.sharding.named_state import stand_in


def whole_scalars(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> list[nn.Parameter]:
    """Return the trained parameters without dimensions, which every rank keeps whole on its device.

    Fused optimizers take either plain tensors or distributed ones, so theirs is a replicated view of each.
    """
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        parameter.data = parameter.data.to(device)
    trained = [parameter for parameter in scalars if parameter.requires_grad]
    for parameter in trained:
        view = DTensor.from_local(parameter.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        stand_in(parameter, nn.Parameter(view))
    return trained


def copy_attributes(attributes: Mapping[str, Any], parameter: nn.Parameter) -> None:
    """Give a parameter the attributes of the one that it replaces, by which recipes choose how it is optimized."""
    parameter.__dict__.update({name: value for name, value in attributes.items() if name not in parameter.__dict__})


def materialise(model: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Allocate the parameters' shards without values, and move the buffers with their values to the device."""
    scalars = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == 0}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    moved = {id(buffer): buffer.to(device) for buffer in buffers.values()}
    model.to_empty(device=torch.device("cpu") if offload else device)
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, moved[id(buffer)])
    first: dict[int, nn.Parameter] = {}
    for name, scalar in scalars.items():  # FSDP2 keeps the ties of those that it shards
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, first.setdefault(id(scalar), model.get_parameter(name)))

"""This rank's slice of a tensor that is spread over a mesh of ranks, as a flat range of the whole.

Slices are along dimension 0 in the manner of torch.chunk: all of one size, but for the last ones, which may be shorter
or empty. That is how FSDP2 spreads parameters.
"""

from math import prod

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardlaunch.checkpoints.state import MODEL, Fragment, StateReader, TensorSpec


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank holds: its slice, or all of a plain tensor. No copy."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where this rank's part lies among the elements of the whole."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    start, length = 0, tensor.shape[0]
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "only slices along dimension 0 are flat ranges"
            size = -(-length // tensor.device_mesh.size(dimension))
            begin = min(length, size * tensor.device_mesh.get_local_rank(dimension))
            start, length = start + begin, min(size, length - begin)
        else:
            assert isinstance(placement, Replicate), "each rank has but a summand of this tensor"
    row = prod(tensor.shape[1:])
    return start * row, (start + length) * row


def fragment(name: str, tensor: torch.Tensor, *, section: str = MODEL, entry: str = "") -> Fragment:
    """Return this rank's part of a tensor as a piece of a run's state."""
    spec = TensorSpec(name=name, section=section, entry=entry, shape=tuple(tensor.shape), dtype=tensor.dtype)
    start, end = flat_range(tensor)
    return Fragment(spec=spec, flat_start=start, flat_end=end, tensor=local_part(tensor))


def read_slice(reader: StateReader, spec: TensorSpec, like: torch.Tensor) -> torch.Tensor:
    """Read the part of a saved tensor that this rank holds of `like`, in the shape of that part."""
    start, end = flat_range(like)
    return reader.read(spec, start, end).reshape(local_part(like).shape)


def like_slice(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the tensor that is spread as `like` is and of which `part` is this rank's part."""
    part = part.to(local_part(like).device)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )

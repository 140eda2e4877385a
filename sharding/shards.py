"""This rank's shard of a tensor that is sharded over a mesh of ranks, as a flat range of the whole tensor.

Tensors are sharded along dimension 0 as torch.chunk does, and as FSDP2 shards parameters: all shards have the same
size, except the last ones, which may be shorter or empty.
"""

from math import prod

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardlaunch.checkpoints.state import MODEL, ONLY, Fragment, Replica, StateReader, TensorSpec, fill


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, or all of a plain tensor, without a copy."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the range [start, end) of this rank's shard among the elements of the whole tensor."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    start, length = 0, tensor.shape[0] if tensor.ndim else 1
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "only shards along dimension 0 are flat ranges"
            size = -(-length // tensor.device_mesh.size(dimension))
            begin = min(length, size * tensor.device_mesh.get_local_rank(dimension))
            start, length = start + begin, min(size, length - begin)
        else:
            assert isinstance(placement, Replicate), "this tensor is a partial sum on each rank"
    row = prod(tensor.shape[1:])
    return start * row, (start + length) * row


def replica(tensor: torch.Tensor) -> Replica | None:
    """Return which of several equal shards this rank's is; None for a plain tensor, which every rank holds."""
    if not isinstance(tensor, DTensor):
        return None
    index, count = 0, 1
    for dimension, placement in enumerate(tensor.placements):
        if not isinstance(placement, Shard):
            size = tensor.device_mesh.size(dimension)
            index, count = index * size + tensor.device_mesh.get_local_rank(dimension), count * size
    return Replica(index, count)


def fragment(name: str, tensor: torch.Tensor, *, section: str = MODEL, entry: str = "") -> Fragment:
    """Return this rank's shard of a tensor as a fragment of the run's state."""
    spec = TensorSpec(name=name, section=section, entry=entry, shape=tuple(tensor.shape), dtype=tensor.dtype)
    start, end = flat_range(tensor)
    return Fragment(spec=spec, flat_start=start, flat_end=end, tensor=local_shard(tensor), replica=replica(tensor))


def read_shard(reader: StateReader, spec: TensorSpec, like: torch.Tensor) -> torch.Tensor:
    """Read the range of a saved tensor that is this rank's shard of `like`, in the shard's shape."""
    start, end = flat_range(like)
    return reader.read(spec, start, end, replica(like) or ONLY).reshape(local_shard(like).shape)


def fill_shard(reader: StateReader, spec: TensorSpec, tensor: torch.Tensor) -> None:
    """Read the range of a saved tensor that is this rank's shard of `tensor` into it."""
    fill(reader, spec, flat_range(tensor)[0], local_shard(tensor), replica(tensor) or ONLY)


def shard_like(shard: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is sharded like `like`, with `shard` as this rank's shard."""
    shard = shard.to(local_shard(like).device)
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )

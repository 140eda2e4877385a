"""This rank's shard of a tensor that is sharded over a mesh of ranks, as a flat range of the whole tensor.

Tensors are sharded along dimension 0 as torch.chunk does, and as FSDP2 shards parameters: all shards have the same
size, except the last ones, which may be shorter or empty. Under tensor parallelism it is the part of a rank's model
group that is sharded so (see `parts`).
"""

from math import prod

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardlaunch.checkpoints.state import MODEL, ONLY, Fragment, Replica, StateReader, TensorSpec, fill
from shardlaunch.sharding.parts import Part, columns_of_rows, row_ranges, rows_of_columns


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


def replica(tensor: torch.Tensor, part: Part | None = None) -> Replica | None:
    """Return which of several equal shards this rank's is; None for a plain tensor, which every rank holds."""
    if not isinstance(tensor, DTensor):
        return None
    index, count = 0, 1
    for dimension, placement in enumerate(tensor.placements):
        if not isinstance(placement, Shard):
            size = tensor.device_mesh.size(dimension)
            index, count = index * size + tensor.device_mesh.get_local_rank(dimension), count * size
    if part is not None and part.dim is None:  # so that the numbers are in the order of the ranks, as for plain tensors
        index, count = index * part.num_parts + part.number, count * part.num_parts
    return Replica(index, count)


def fragment(
    name: str, tensor: torch.Tensor, *, section: str = MODEL, entry: str = "", part: Part | None = None
) -> Fragment:
    """Return this rank's shard of a tensor, or of its part, as a fragment of the run's state.

    All ranks of a model group: of columns they exchange rows, since these are ranges of the whole tensor.
    """
    shape = part.whole_shape(tensor.shape) if part is not None else tuple(tensor.shape)
    spec = TensorSpec(name=name, section=section, entry=entry, shape=shape, dtype=tensor.dtype)
    start, end = _range_in_whole(tensor, part)
    values = local_shard(tensor)
    if part is not None and part.dim == 1:
        values = rows_of_columns(values, part)
    return Fragment(spec=spec, flat_start=start, flat_end=end, tensor=values, replica=replica(tensor, part))


def _range_in_whole(tensor: torch.Tensor, part: Part | None) -> tuple[int, int]:
    """Return the range of elements of the whole tensor that this rank saves and reads."""
    start, end = flat_range(tensor)
    if part is None or part.dim is None:
        return start, end
    if part.dim == 0:
        offset = part.number * tensor.numel()
        return offset + start, offset + end
    assert (part.dim, tensor.ndim) == (1, 2), "only matrices are divided into columns"
    width = tensor.shape[1]
    first, last = row_ranges((end - start) // width, part.num_parts)[part.number]
    whole_width = width * part.num_parts
    return (start // width + first) * whole_width, (start // width + last) * whole_width


def read_shard(reader: StateReader, spec: TensorSpec, like: torch.Tensor, part: Part | None = None) -> torch.Tensor:
    """Read what is this rank's shard of `like`, or of its part, of a saved tensor, in the shard's shape.

    All ranks of a model group.
    """
    start, end = _range_in_whole(like, part)
    values = reader.read(spec, start, end, replica(like, part) or ONLY)
    shard = local_shard(like)
    if part is not None and part.dim == 1:
        return columns_of_rows(values.view(-1, spec.shape[1]), len(shard), part)
    return values.reshape(shard.shape)


def fill_shard(reader: StateReader, spec: TensorSpec, tensor: torch.Tensor, part: Part | None = None) -> None:
    """Read what is this rank's shard of `tensor`, or of its part, of a saved tensor into it.

    All ranks of a model group.
    """
    if part is not None and part.dim == 1:
        local_shard(tensor).copy_(read_shard(reader, spec, tensor, part))
    else:
        fill(reader, spec, _range_in_whole(tensor, part)[0], local_shard(tensor), replica(tensor, part) or ONLY)


def shard_like(shard: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is sharded like `like`, with `shard` as this rank's shard."""
    shard = shard.to(local_shard(like).device)
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )

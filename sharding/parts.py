"""Parts of parameters: under tensor parallelism, the ranks of a model group divide a parameter before it is sharded.

All ranks of a model group run the same micro-batches. A group has consecutive ranks; the ranks with the same place in
their groups hold the same part, which FSDP2 shards over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn

_PART = "_shardlaunch_part"


@dataclass(frozen=True)
class Part:
    """Which part of a parameter a rank's model group leaves to this rank: equal ranges of a dimension, or all of it."""

    dim: int | None
    """The dimension that is divided; None: each rank of the group has the whole."""
    number: int
    num_parts: int
    group: dist.ProcessGroup
    has_partial_gradient: bool = False
    """Each rank uses the whole for its own features only, so that gradients are to be summed over the group."""

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the whole of a parameter whose part has this shape."""
        return tuple(size * self.num_parts if dim == self.dim else size for dim, size in enumerate(shape))


def part_of(parameter: torch.Tensor) -> Part | None:
    """Return which part of a whole a parameter of the model is; None where there are no model groups."""
    return getattr(parameter, _PART, None)


def mark(parameter: nn.Parameter, part: Part) -> None:
    """Note which part of a whole a parameter is."""
    setattr(parameter, _PART, part)


def row_ranges(num_rows: int, count: int) -> list[tuple[int, int]]:
    """Divide rows among the ranks of a group, as evenly as possible."""
    ends = list(accumulate((num_rows + i) // count for i in range(count)))
    return list(zip([0, *ends], ends, strict=False))


def rows_of_columns(columns: torch.Tensor, part: Part) -> torch.Tensor:
    """Return this rank's rows of a matrix of which each rank of the group has the columns of its part. All its ranks.

    Rows are divided as `row_ranges` says. So no rank needs memory for more than a part.
    """
    ranges = row_ranges(len(columns), part.num_parts)
    rows = ranges[part.number][1] - ranges[part.number][0]
    given = columns.contiguous().view(-1)
    width = columns.shape[1]
    got = _exchanged(given, [(end - start) * width for start, end in ranges], [rows * width] * part.num_parts, part)
    return torch.cat([piece.view(rows, width) for piece in got], dim=1)


def columns_of_rows(rows: torch.Tensor, num_rows: int, part: Part) -> torch.Tensor:
    """Undo `rows_of_columns` of a part with `num_rows` rows. All ranks of the group."""
    ranges = row_ranges(num_rows, part.num_parts)
    width = rows.shape[1] // part.num_parts
    given = torch.cat([piece.reshape(-1) for piece in rows.split(width, dim=1)])
    got = _exchanged(
        given, [len(rows) * width] * part.num_parts, [(end - start) * width for start, end in ranges], part
    )
    return torch.cat([piece.view(-1, width) for piece in got])


def _exchanged(given: torch.Tensor, sent: list[int], received: list[int], part: Part) -> Sequence[torch.Tensor]:
    """Send a piece of `given` to each rank of the group, and return what each sends."""
    got = given.new_empty(sum(received))
    dist.all_to_all_single(got, given, received, sent, group=part.group)
    return torch.split(got, received)

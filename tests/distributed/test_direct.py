"""FSDP2's collectives by messages from rank to rank, beside those of the library."""

import torch
import torch.distributed as dist

from shardlaunch.sharding import direct
from shardlaunch.sharding.direct import DirectGather, DirectReduction
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import connect, disconnect
from tests.distributed.ranks import run_on_ranks

ELEMENTS = 6_000  # a multiple of the numbers of ranks


def _differences() -> list[str]:
    """Return which results of a rank differ from those of the library."""
    world = connect(read_environment())
    group = dist.group.WORLD
    assert group is not None
    assert direct.fits(group)
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        values = (torch.arange(ELEMENTS) % 11 + world.rank).to(dtype)  # sums are exact in each dtype
        expected = torch.empty(ELEMENTS // world.size, dtype=dtype)
        dist.reduce_scatter_single(expected, values.clone(), group=group)
        part = DirectReduction().allocate((len(expected),), dtype=dtype, device=world.device)
        DirectReduction()(part, values, group, dist.ReduceOp.SUM)
        whole_expected = torch.empty_like(values)
        dist.all_gather_single(whole_expected, part, group=group)
        whole = torch.zeros_like(values)
        own = whole.chunk(world.size)[world.rank]
        own.copy_(part)
        for source in (part, own):  # FSDP2 gathers from the place where the part ends up
            DirectGather()(whole, source, group)
            if not torch.equal(whole, whole_expected):
                wrong.append(f"gather of {dtype}")
        if not torch.equal(part, expected):
            wrong.append(f"sum of {dtype}")
    disconnect(world)
    return wrong


def test_parts_sent_from_rank_to_rank_add_up_and_are_gathered_as_the_library_does() -> None:
    for ranks in (2, 3):
        assert run_on_ranks(ranks, _differences) == [[]] * ranks

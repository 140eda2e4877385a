"""Ranks connect to few others, and notice nevertheless when one is gone."""

import math
import os

from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import abandon, connect, disconnect
from tests.distributed.ranks import run_on_ranks

NUM_RANKS = 24
OTHER_FILES = 6  # per process group: where it listens, the events that it waits for


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _opened() -> int:
    """Return how many descriptors a rank opens for two process groups and some messages."""
    before = _descriptors()
    world = connect(read_environment())
    try:
        world.peers.gather([world.rank])
        world.peers.of_first([world.rank])
        world.peers.share_error(f"rank {world.rank}" if world.rank > 5 else None)
        return _descriptors() - before
    finally:
        disconnect(world)


def test_connections_grow_with_the_logarithm_of_the_ranks() -> None:
    first, *others = run_on_ranks(NUM_RANKS, _opened)
    most = 2 * (2 * math.ceil(math.log2(NUM_RANKS)) + OTHER_FILES)
    assert most < 2 * (NUM_RANKS - 1)
    assert max(others) <= most
    assert first <= most + NUM_RANKS + 10  # connections of the store, which is there


def _noticed() -> str:
    """Leave on the last rank, before any messages; return what the others see of it."""
    world = connect(read_environment())
    if world.rank == world.size - 1:
        abandon(world)
        return "left"
    try:
        world.peers.gather([world.rank])
    except RuntimeError:
        return "noticed"
    finally:
        abandon(world)
    return "not noticed"


def test_a_rank_that_is_gone_is_noticed_by_those_that_have_said_nothing_to_it() -> None:
    assert run_on_ranks(7, _noticed) == ["noticed"] * 6 + ["left"]

"""What ranks say to each other: values of rank 0, sums, errors, bytes, also none at all and many."""

import numpy as np

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.errors import UserError
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import connect, disconnect
from tests.distributed.ranks import run_on_ranks

LONG = list(range(-5, 100_000))


def said(peers: Peers) -> list[object]:
    """Return what this rank hears."""
    mine, last = peers.rank, peers.num_ranks - 1
    found: list[object] = [
        peers.of_first([] if mine == 0 else [9]),
        peers.of_first([-(1 << 63), 7] if mine == 0 else []),
        peers.of_first(LONG if mine == 0 else []) == LONG,
        peers.data_of(last, b"\0x" if mine == last else b""),
        peers.data_of(last, b""),
        peers.most([mine, -mine, (1 << 63) - 1]),
        peers.any(mine == last),
        peers.any(False),
        peers.lists([mine] * mine),
        peers.sum(np.array([mine])).tolist(),
    ]
    for failing in ((), (last,), (0, last)):
        try:
            peers.together(lambda failing=failing: fail(peers) if peers.rank in failing else None)
        except UserError as error:
            found.append(str(error))
    return found


def fail(peers: Peers) -> None:
    raise UserError(f"rank {peers.rank}")


def of_rank() -> list[object]:
    world = connect(read_environment())
    try:
        return said(world.peers)
    finally:
        disconnect(world)


def test_three_ranks_hear_the_same() -> None:
    ends = [[-(1 << 63), 7], True, b"\0x", b"", [2, 0, (1 << 63) - 1], True, False, [[], [1], [2, 2]], [3]]
    assert run_on_ranks(3, of_rank) == [[[], *ends, "rank 2", "rank 0"]] * 3


def test_one_rank_hears_itself() -> None:
    ends = [[-(1 << 63), 7], True, b"\0x", b"", [0, 0, (1 << 63) - 1], True, False, [[]], [0]]
    assert said(Peers()) == [[], *ends, "rank 0", "rank 0"]

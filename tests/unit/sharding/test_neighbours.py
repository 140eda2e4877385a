"""Ranks of one machine are found by what all ranks say about where they run."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from shardlaunch.errors import UserError
from shardlaunch.sharding.environment import LaunchEnvironment
from shardlaunch.sharding.neighbours import Neighbours, Place, find_neighbours, neighbours_among, this_place


def place(machine: str = "a", cores: tuple[int, ...] = (0, 1), gpus: tuple[str, ...] = ()) -> Place:
    return Place(machine=machine, cores=frozenset(cores), gpus=gpus)


def env(rank: int, *, local_rank: int | None = None) -> LaunchEnvironment:
    return LaunchEnvironment(rank=rank, local_rank=local_rank or 0, local_is_known=local_rank is not None)


def among(places: list[Place], of_rank: LaunchEnvironment) -> Neighbours:
    return neighbours_among(dict(enumerate(places)), of_rank)


def test_ranks_dealt_in_turn() -> None:
    """As by srun --distribution=cyclic and mpirun --map-by node."""
    places = [place("a"), place("b"), place("a"), place("b"), place("b")]
    assert among(places, env(2)).ranks == (0, 2)
    assert among(places, env(3)).ranks == (1, 3, 4)


def test_machines_of_one_name() -> None:
    here = this_place(use_cuda=False)
    assert len(here.machine.split()) == 2  # the name, and what differs between machines and their restarts
    assert Place.of_text(here.text()) == here
    assert Place.of_text(place(gpus=("u", "v")).text()) == place(gpus=("u", "v"))


def test_cores_of_their_own_are_not_shared_out() -> None:
    apart = [place(cores=(0, 1)), place(cores=(2, 3)), place(cores=(2, 3)), place("b", cores=(2, 3))]
    assert [among(apart, env(rank)).num_on_cores for rank in range(4)] == [1, 2, 2, 1]


def test_gpus() -> None:
    all_seen = [place(gpus=("u", "v")), place(gpus=("u", "v"))]
    assert [among(all_seen, env(rank)).gpu for rank in range(2)] == [0, 1]
    assert among(all_seen, env(0, local_rank=1)).gpu == 1
    one_each = [place(gpus=("u",)), place(gpus=("v",))]
    assert among(one_each, env(1, local_rank=1)).gpu == 0
    for rank in range(2):
        with pytest.raises(UserError, match="ranks 0, 1 see one and the same GPU"):
            among([place(gpus=("u",)), place(gpus=("u",))], env(rank, local_rank=rank))
    with pytest.raises(UserError, match="rank 2 is number 2 of its machine, counted from 0, and sees 2 GPUs"):
        among([*all_seen, place(gpus=("u", "v"))], env(2))


def test_ranks_ask_for_those_of_their_machine_only() -> None:
    """Through the store, in which each rank reads a text of its machine's size, whatever the number of ranks."""
    store, num_ranks = HashStore(), 12
    places = [place(f"m{rank % 3}", cores=(rank % 2,)) for rank in range(num_ranks)]

    def found(rank: int) -> Neighbours:
        return find_neighbours(replace(env(rank), world_size=num_ranks), store, places[rank])

    with ThreadPoolExecutor(num_ranks) as threads:
        all_found = list(threads.map(found, range(num_ranks)))
    assert [one.ranks for one in all_found[:3]] == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]
    assert {one.num_on_cores for one in all_found} == {2}
    assert len(store.get("shardlaunch/machine/m0")) < 4 * 20

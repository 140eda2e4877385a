"""Ranks of one machine are found by what all ranks say about where they run."""

import pytest

from shardlaunch.errors import UserError
from shardlaunch.sharding.environment import LaunchEnvironment
from shardlaunch.sharding.neighbours import Place, neighbours_among, this_place


def place(machine: str = "a", cores: tuple[int, ...] = (0, 1), gpus: tuple[str, ...] = ()) -> Place:
    return Place(machine=machine, cores=frozenset(cores), gpus=gpus)


def env(rank: int, *, local_rank: int | None = None) -> LaunchEnvironment:
    return LaunchEnvironment(rank=rank, local_rank=local_rank or 0, local_is_known=local_rank is not None)


def test_ranks_dealt_in_turn() -> None:
    """As by srun --distribution=cyclic and mpirun --map-by node."""
    places = [place("a"), place("b"), place("a"), place("b"), place("b")]
    assert neighbours_among(places, env(2)).ranks == (0, 2)
    assert neighbours_among(places, env(3)).ranks == (1, 3, 4)


def test_machines_of_one_name() -> None:
    here = this_place(use_cuda=False)
    assert len(here.machine.split()) == 2  # the name, and what differs between machines and their restarts
    assert Place.of_text(here.text()) == here
    assert Place.of_text(place(gpus=("u", "v")).text()) == place(gpus=("u", "v"))


def test_cores_of_their_own_are_not_shared_out() -> None:
    apart = [place(cores=(0, 1)), place(cores=(2, 3)), place(cores=(2, 3)), place("b", cores=(2, 3))]
    assert [neighbours_among(apart, env(rank)).num_on_cores for rank in range(4)] == [1, 2, 2, 1]


def test_gpus() -> None:
    all_seen = [place(gpus=("u", "v")), place(gpus=("u", "v"))]
    assert [neighbours_among(all_seen, env(rank)).gpu for rank in range(2)] == [0, 1]
    assert neighbours_among(all_seen, env(0, local_rank=1)).gpu == 1
    one_each = [place(gpus=("u",)), place(gpus=("v",))]
    assert neighbours_among(one_each, env(1, local_rank=1)).gpu == 0
    for rank in range(2):
        with pytest.raises(UserError, match="ranks 0, 1 see one and the same GPU"):
            neighbours_among([place(gpus=("u",)), place(gpus=("u",))], env(rank, local_rank=rank))
    with pytest.raises(UserError, match="rank 2 is number 2 of its machine, counted from 0, and sees 2 GPUs"):
        neighbours_among([*all_seen, place(gpus=("u", "v"))], env(2))

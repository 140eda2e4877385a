"""Which ranks share a machine, its cores and its GPUs: found through the store where no launcher says it for sure.

A launcher's local ranks say how many there are, not which: Slurm and mpirun may deal ranks to machines in turn.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardlaunch.errors import UserError
from shardlaunch.sharding.environment import LaunchEnvironment

_NUM_PLACED, _ALL_PLACED = "shardlaunch/placed", "shardlaunch/all-placed"
_END = "\0"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # machines made from one image may share a name


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    machine: str
    cores: frozenset[int]
    gpus: tuple[str, ...] = ()  # those that the rank sees, by identifiers

    def text(self) -> str:
        """Return this place as one line."""
        cores = ",".join(map(str, sorted(self.cores)))
        return "\n".join((self.machine, cores, *self.gpus))

    @classmethod
    def of_text(cls, text: str) -> "Place":
        """Return the place of which this is the text."""
        machine, cores, *gpus = text.split("\n")
        return cls(machine=machine, cores=frozenset(map(int, filter(None, cores.split(",")))), gpus=tuple(gpus))


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The ranks of one machine."""

    ranks: tuple[int, ...]
    num_on_cores: int
    """How many of them, this one included, share its cores: a launcher may have given each its own."""
    gpu: int = 0


def this_place(*, use_cuda: bool) -> Place:
    """Return where this process runs."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    gpus = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count() * use_cuda)]
    return Place(machine=f"{socket.gethostname()} {boot_id}", cores=frozenset(cores), gpus=tuple(gpus))


def find_neighbours(env: LaunchEnvironment, store: dist.Store, place: Place) -> Neighbours:
    """Return the ranks of this machine, from what its ranks say about where they run. All ranks.

    Raises UserError if two ranks would use one GPU.
    """
    key = f"shardlaunch/machine/{place.machine}"
    texts_of: Any = store  # torch's stubs do not have append()
    texts_of.append(key, f"{env.rank}\n{place.text()}{_END}")  # a text per machine, so that no rank reads those of all
    if store.add(_NUM_PLACED, 1) == env.world_size:
        store.set(_ALL_PLACED, "")
    store.wait([_ALL_PLACED])
    texts = (text.split("\n", 1) for text in store.get(key).decode().split(_END)[:-1])
    return neighbours_among({int(rank): Place.of_text(text) for rank, text in texts}, env)


def neighbours_among(places: Mapping[int, Place], env: LaunchEnvironment) -> Neighbours:
    """Return the ranks of this machine, of the places of ranks. Raises UserError if two ranks would use one GPU."""
    place = places[env.rank]
    ranks = tuple(sorted(rank for rank, other in places.items() if other.machine == place.machine))
    on_cores = [rank for rank in ranks if places[rank].cores & place.cores]
    gpu = env.local_rank if env.local_is_known else ranks.index(env.rank)
    if len(place.gpus) == 1:
        gpu = 0  # a launcher that shows each rank its own GPU
        sharing = [rank for rank in ranks if places[rank].gpus == place.gpus]
        if len(sharing) > 1:
            raise UserError(
                f"ranks {', '.join(map(str, sharing))} see one and the same GPU. Start at most one rank per GPU, give "
                f"each its own (in Slurm: --gpus-per-task 1), or set ACCELERATE_USE_CPU=true."
            )
    elif place.gpus and gpu >= len(place.gpus):
        raise UserError(
            f"rank {env.rank} is number {gpu} of its machine, counted from 0, and sees {len(place.gpus)} GPUs. Start "
            f"at most one rank per GPU, or set ACCELERATE_USE_CPU=true."
        )
    return Neighbours(ranks=ranks, num_on_cores=max(1, len(on_cores)), gpu=gpu)

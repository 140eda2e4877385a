"""The ranks of a run and their collectives."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.errors import UserError
from shardlaunch.progress import progress
from shardlaunch.sharding.environment import LaunchEnvironment
from shardlaunch.sharding.interfaces import choose_interfaces
from shardlaunch.sharding.meeting import ended_after, meet
from shardlaunch.sharding.neighbours import Neighbours, find_neighbours, this_place

T = TypeVar("T")

# The others may wait long while rank 0 prepares data; a dead rank is noticed at once by its closed socket.
TIMEOUT = timedelta(hours=2)
# The watchdog ends a run when nobody makes progress, and not while the one that the others wait for does.
WATCHED_TIMEOUT = timedelta(days=14)
CPU = torch.device("cpu")
# Ranks connect to those that they exchange messages with, when they first do. Else each of R ranks has R sockets per
# process group.
CONNECT_VARIABLE = "TORCH_GLOO_LAZY_INIT"


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks of a run: its rank, its device, and the process group for CPU tensors."""

    rank: int = 0
    size: int = 1
    local_ranks: Sequence[int] = range(1)
    """The ranks of this machine, in order."""
    num_on_cores: int = 1
    """How many of them share the cores of this one."""
    device: torch.device = CPU
    host_group: dist.ProcessGroup | None = None
    host_backend: str = "gloo"
    """Backend of process groups for CPU tensors."""
    store: dist.Store | None = None
    says: str = ""
    """What was found while the ranks connected."""
    owns_group: bool = True
    """The default process group was made by `connect`, and ends with the run."""
    model_ranks: int = 1
    """How many consecutive ranks run the same micro-batches, each with a part of the model."""

    @property
    def local_size(self) -> int:
        return len(self.local_ranks)

    @property
    def local_index(self) -> int:
        """The number of this rank's GPU or, on CPU, of this rank among those of its machine."""
        return self.local_ranks.index(self.rank) if self.device.index is None else self.device.index

    @property
    def is_local_main(self) -> bool:
        return self.rank == self.local_ranks[0]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Return the number of this rank's micro-batches among those that run at once."""
        return self.rank // self.model_ranks

    @property
    def num_data_ranks(self) -> int:
        return self.size // self.model_ranks

    @property
    def is_counted(self) -> bool:
        """Whether sums over the ranks' data are to have what this rank has: one rank speaks for the same data."""
        return self.rank % self.model_ranks == 0

    @cached_property
    def peers(self) -> Peers:
        """Return these ranks in the form that checkpoints use."""
        return Peers(rank=self.rank, num_ranks=self.size, group=self.host_group, on_collective=progress.mark)

    @cached_property
    def background_peers(self) -> Peers:
        """Return these ranks for one background thread of each. All ranks, the first time."""
        group = new_group(timeout=WATCHED_TIMEOUT) if self.size > 1 else None
        return Peers(rank=self.rank, num_ranks=self.size, group=group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place, and return it. All ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_of_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place, what each has of its own data, and return it. All ranks."""
        return self.sum(tensor if self.is_counted else tensor.zero_())

    def begin_sum(self, tensor: torch.Tensor) -> dist.Work | None:
        """Start to sum a tensor over the ranks, in place; call `wait()` on the result. All ranks."""
        return dist.all_reduce(tensor, async_op=True) if self.size > 1 else None

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and then on the others, which use the caches that it filled. All ranks.

        Raises the UserError of any rank on every rank.
        """
        mine = self.peers.together(lambda: [work()] if self.is_main else [])
        others = self.peers.together(lambda: [] if self.is_main else [self._elsewhere(work)])
        return [*mine, *others][0]

    def _elsewhere(self, work: Callable[[], T]) -> T:
        """Run what rank 0 has run without an error; one on another host names it."""
        try:
            return work()
        except UserError as error:
            if 0 in self.local_ranks:
                raise
            where = f"on {socket.gethostname()}, where rank {self.rank} is; rank 0 has no such error"
            raise UserError(f"{error} ({where})") from error

    def meet_at_end(self) -> None:
        """Wait until all ranks have done their work, or are gone, as a signal may end one after its work. All ranks."""
        if self.host_group is not None:
            with suppress(RuntimeError):
                dist.barrier(group=self.host_group)

    def is_first_to(self, action: str) -> bool:
        """Return True on only one rank: the first that asks. Any rank, at any time, even if others are gone."""
        if self.store is None:
            return self.is_main
        try:
            return int(self.store.add(f"shardlaunch/{action}", 1)) == 1
        except RuntimeError:  # the store is gone with its host: no other rank can print either
            return True

    def await_others_at(self, action: str, *, most_s: float) -> None:
        """Wait on rank 0 until all ranks have called `is_first_to(action)`, for at most `most_s` seconds.

        If rank 0 left with its store and sockets, ranks slightly behind would lose their connection first.
        """
        if self.store is None or not self.is_main:
            return
        end = time.monotonic() + most_s
        with suppress(RuntimeError):  # the store is gone with its host, a launcher
            while self.store.add(f"shardlaunch/{action}", 0) < self.size and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(0.05)  # the last of them gets its answer, with which it does not print too


def connect(
    env: LaunchEnvironment, *, needs_group: bool = False, is_watched: bool = False, model_ranks: int = 1
) -> World:
    """Join the ranks of this launch: gloo on CPU, NCCL beside gloo on GPUs. All ranks.

    A process that was started by itself has a process group, of one, only if it `needs_group`. A collective waits for
    2 hours, or as long as the watchdog lets it if the run `is_watched`. Raises UserError when there are more ranks than
    GPUs, and when the ranks do not meet.
    """
    use_cuda = torch.cuda.is_available() and not env.use_cpu
    if env.knows_neighbours and use_cuda and env.local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{env.local_world_size} ranks were started on this machine, which has {torch.cuda.device_count()} "
            f"GPUs. Start at most one rank per GPU, or set ACCELERATE_USE_CPU=true."
        )
    if not env.is_distributed and not needs_group:
        return World(device=_device(env.local_rank, use_cuda=use_cuda))
    store, rank, world_size = meet(env), env.rank, env.world_size
    if env.knows_neighbours:
        local_ranks = range(first := rank - env.local_rank, first + env.local_world_size)
        neighbours = Neighbours(ranks=tuple(local_ranks), num_on_cores=env.local_world_size, gpu=env.local_rank)
    else:
        neighbours = find_neighbours(env, store, this_place(use_cuda=use_cuda))
    device = _device(neighbours.gpu, use_cuda=use_cuda)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = WATCHED_TIMEOUT if is_watched else TIMEOUT
    owns_group = not dist.is_initialized()  # a script that calls `fit` may have a process group, which stays its own
    says = ""
    if len(neighbours.ranks) < world_size:
        says = choose_interfaces(env, store, is_first=rank == neighbours.ranks[0])
    os.environ.setdefault(CONNECT_VARIABLE, "1")
    # Without a watchdog yet: a rank that is lost now would be waited for as long as in a collective.
    with ended_after(env) if is_watched else nullcontext():
        if owns_group:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            if not use_cuda:
                dist.barrier()  # as in new_group()
        host_group = new_group(timeout=timeout)
    return World(
        rank=rank,
        size=world_size,
        local_ranks=neighbours.ranks,
        num_on_cores=neighbours.num_on_cores,
        device=device,
        host_group=host_group,
        store=store,
        says=says,
        owns_group=owns_group,
        model_ranks=model_ranks,
    )


def new_group(*, timeout: timedelta | None = None, backend: str = "gloo") -> dist.ProcessGroup:
    """Return a group for tensors of the CPU, in which ranks that share a step of a ring or a tree are connected.

    All ranks. A rank that is gone is noticed by those that wait for it: one that is not connected would wait for ever.
    """
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    dist.barrier(group=group)
    return group


@contextmanager
def connecting() -> Iterator[None]:
    """Connect the ranks of process groups that libraries make within, as `new_group` does. All ranks."""
    before = process_groups()
    yield
    for group in process_groups():
        if group not in before and dist.get_backend(group) == "gloo":
            dist.barrier(group=group)


def process_groups() -> list[dist.ProcessGroup]:
    """Return the process groups that this rank is in, in the order in which all ranks have made them."""
    return list(distributed_c10d._world.pg_map)


def _device(gpu: int, *, use_cuda: bool) -> torch.device:
    if not use_cuda:
        return CPU
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    return device


def abandon(world: World) -> None:
    """Leave the ranks after an error, without waiting for them.

    They notice when the sockets of the group are closed, with the last reference to it: the frames of the error, which
    its caller may keep, have some to the world.
    """
    if world.host_group is not None:
        with suppress(RuntimeError):
            _destroy_groups(world)
        for peers in _all_peers(world):
            object.__setattr__(peers, "group", None)
        object.__setattr__(world, "host_group", None)


def disconnect(world: World) -> None:
    """Leave the process group. All ranks."""
    if world.host_group is not None:
        world.meet_at_end()  # no rank closes its sockets while another still works
        _destroy_groups(world)


def _destroy_groups(world: World) -> None:
    if world.owns_group:
        dist.destroy_process_group()
        return
    for peers in _all_peers(world):
        if peers.group is not None:
            dist.destroy_process_group(peers.group)


def _all_peers(world: World) -> list[Peers]:
    return [world.peers, *([world.background_peers] if "background_peers" in vars(world) else [])]


def threads_per_rank(requested: int, env: LaunchEnvironment, world: World) -> int:
    """Return the number of CPU threads per rank.

    `requested`, if above 0; else OMP_NUM_THREADS, if above 1 (launchers set 1 by default, so 1 means nothing); else an
    even division of the cores that this process may use among the ranks that may use them.
    """
    if requested > 0:
        return requested
    if env.threads is not None and env.threads > 1:
        return env.threads
    return max(1, available_cores() // world.num_on_cores)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

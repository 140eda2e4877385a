"""Heartbeats of the ranks through the launch's store: each says where it is, and reads where the others are."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardlaunch.sharding.world import World, process_groups

FEW_RANKS = 16
_HANG = "shardlaunch/hang"
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_DONE = "shardlaunch/hang-reported"


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of itself."""

    number: int = 0
    place: str = "not started"
    collective: str = ""
    """The last collective, of a rank that makes no progress."""
    num_marks: int = -1
    collectives: dict[str, int] = {}
    """Number of collectives begun, by process group."""
    age_s: float = 0.0
    """Time without progress."""
    limit_s: float = 0.0
    """How long it may be without, in what it does now."""
    is_debugged: bool = False
    has_left: bool = False
    """The rank has done its work."""
    host: str = ""
    pid: int = 0
    notes: int = -1
    """Descriptor of a file in memory where the process notes what it does."""
    stacks: int = -1
    """The same of the one into which a signal has it write its stacks."""
    born: float = 0.0
    """When the process began, by the clock of its host: another may have its number later."""


class Heartbeats:
    """Exchange beats in a thread of its own, since the store may stop to answer together with the process it is in.

    `now` returns this rank's beat. The others' are read while `is_looking`, and of few ranks always. Of many, those of
    this machine and of rank 0 are read once, to be known where the store does not answer.
    """

    def __init__(self, world: World, now: Callable[[], Beat], *, interval_s: float) -> None:
        self._world = world
        self._now = now
        self._interval_s = interval_s
        # A connection of its own: the ranks' collectives wait on the other one.
        store: Any = world.store if world.size > 1 else None  # torch's stubs do not have all that it has
        self._store: dist.Store | None = store.clone() if store is not None else None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_looking = False
        self.others: dict[int, Beat] = {}
        self.num_answers = 0
        """Grows while the store answers."""
        self.is_hang_known = False
        """A rank reports a hang."""
        self.silent: list[int] = []
        """The ranks that say nothing, by that report."""

    @property
    def is_up_to_date(self) -> bool:
        """Return whether all beats are read always."""
        return self._world.size <= FEW_RANKS

    @property
    def is_alone(self) -> bool:
        return self._store is None

    def start(self) -> None:
        if self._store is not None:
            self._thread = threading.Thread(target=self._run, args=(self._store,), name="heartbeats", daemon=True)
            self._thread.start()

    def give_up(self) -> None:
        """Ask nothing more of the store, which would not answer."""
        self._store = None

    def cease(self) -> None:
        """End the exchange, some time."""
        self._stopping.set()

    def stop(self) -> None:
        """End the exchange; a store that does not answer is left to its thread."""
        self.cease()
        if self._thread is not None:
            self._thread.join(2.0)

    def is_first(self, silent: Sequence[int]) -> bool:
        """Return True on only one rank, the one that reports for all; none if another has reported an error."""
        if self._store is None:
            return True
        with suppress(RuntimeError):  # the store is gone: so is its host
            if self._store.add("shardlaunch/report", 1) == 1:
                self._store.set(_HANG, ",".join(map(str, silent)))
                return True
        return False

    def acknowledge(self) -> None:
        """Say that this rank knows of the hang, and will end with its status."""
        self._await(lambda store: store.add(f"{_HANG}-known", 1) > 0, most_s=0.0)

    def await_acknowledged(self, num_ranks: int, *, most_s: float) -> None:
        """Wait until so many ranks know of the hang."""
        self._await(lambda store: store.add(f"{_HANG}-known", 0) >= num_ranks, most_s=most_s)

    def acknowledge_end(self) -> None:
        """Say that this rank ends, as the last that it asks of the store."""
        self._await(lambda store: store.add(f"{_HANG}-ended", 1) > 0, most_s=0.0)

    def await_ends(self, num_ranks: int, *, most_s: float) -> None:
        """Wait until so many ranks need the store no longer."""
        self._await(lambda store: store.add(f"{_HANG}-ended", 0) >= num_ranks, most_s=most_s)

    def set_reported(self) -> None:
        """Let the others end: the hang is reported."""
        with suppress(RuntimeError):
            if self._store is not None:
                self._store.set(_DONE, "")

    def await_reported(self, *, most_s: float) -> None:
        """Wait until the rank that reports has done so."""
        self._await(lambda store: store.check([_DONE]), most_s=most_s)

    def _await(self, happened: Callable[[dist.Store], bool], *, most_s: float) -> None:
        end = time.monotonic() + most_s
        with suppress(RuntimeError):  # the store is gone
            while self._store is not None and not happened(self._store) and time.monotonic() < end:
                time.sleep(0.05)

    def _run(self, store: dist.Store) -> None:
        with suppress(RuntimeError):  # the store is gone with its host; the watchdog sees no answers
            while True:
                is_last = self._stopping.is_set()
                self._exchange(store)
                if is_last:
                    return
                self._stopping.wait(self._interval_s)

    def _exchange(self, store: dist.Store) -> None:
        store.set(_key(self._world.rank), msgspec.json.encode(self._now()).decode())
        if store.check([_HANG]):
            self.silent = [int(rank) for rank in store.get(_HANG).decode().split(",") if rank]
            self.is_hang_known = True
        if self.is_looking or self.is_up_to_date or not self.others:
            known = range(self._world.size) if self.is_looking or self.is_up_to_date else {0, *self._world.local_ranks}
            others = [rank for rank in known if rank != self._world.rank]
            if others and not store.check([_key(rank) for rank in others]):
                others = [rank for rank in others if store.check([_key(rank)])]
            values = store.multi_get([_key(rank) for rank in others]) if others else []
            beats = [msgspec.json.decode(value, type=Beat) for value in values]
            self.others = dict(zip(others, beats, strict=True))
        self.num_answers += 1


def _key(rank: int) -> str:
    return f"shardlaunch/beat/{rank}"


def this_process() -> tuple[str, int, float]:
    """Return host, process id and start time, for a beat."""
    return socket.gethostname(), os.getpid(), psutil.Process().create_time()


def process_of(beat: Beat) -> psutil.Process | None:
    """Return a rank's process, if it is one of this host and still there."""
    if beat.host != socket.gethostname() or not beat.pid:
        return None
    with suppress(psutil.Error):
        process = psutil.Process(beat.pid)
        return process if process.create_time() == beat.born else None
    return None


def collectives_begun(world: World) -> dict[str, int]:
    """Return the number of collectives that this rank has begun, by process group.

    Without the group of the checkpoints, in which some ranks send more messages than others: `Peers` marks progress.
    """
    numbers: dict[str, int] = {}
    if world.size > 1:
        with suppress(RuntimeError):  # also when a group is added meanwhile
            groups: list[Any] = [*process_groups()]  # torch's stubs do not have all that they have
            for group in groups:
                if group is not world.host_group:
                    numbers[distributed_c10d._world.pg_names[group]] = group._get_sequence_number_for_group()
    return numbers


def last_collective(world: World) -> str:
    """Return the collective that this process waits for, else the last one that it began, as text.

    From torch's flight recorders, which have those that C++ begins too.
    """
    entries: list[dict[str, Any]] = []
    if world.size > 1:
        for name in _RECORDERS:
            dump = getattr(torch._C._distributed_c10d, name, None)
            with suppress(RuntimeError, ValueError):
                entries += json.loads(dump()).get("entries", []) if dump is not None else []
    entries = [entry for entry in entries if not entry.get("is_p2p")]
    open_ = [entry for entry in entries if not entry.get("retired")]
    if not entries:
        return ""
    entry = open_[0] if open_ else entries[-1]
    kinds, sizes = entry.get("input_dtypes", ()), entry.get("input_sizes", ())
    of = " and ".join(f"{kind.lower()} {size}" for kind, size in zip(kinds, sizes, strict=False)) or "nothing"
    what = "waits in the collective" if open_ else "the last collective, which has ended, is"
    number, group = entry.get("collective_seq_id"), entry.get("process_group", [""])[0]
    return f"{what} {entry.get('profiling_name')} of {of} (number {number} of group {group})"

"""Connect the ranks of a launch through a store, and report which ranks are missing."""

import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count

import torch.distributed as dist

from shardlaunch.errors import EXIT_OTHER_ERROR, UserError, some
from shardlaunch.sharding.clusters import LAUNCHER_VARIABLE, NONE
from shardlaunch.sharding.environment import JOIN_TIMEOUT_VARIABLE, LaunchEnvironment

MESSAGE_AFTER_S = 10.0  # waiting time before a message is printed
POLL_INTERVAL_S = 0.05
CONNECTIONS_PER_RANK, OTHER_FILES = 3, 500  # at the store: of a rank, of its heartbeats and of a DeviceMesh
_MET = "shardlaunch/met"
_RUN_NUMBERS = count()
_FOR_ONE = f"For one process, set {LAUNCHER_VARIABLE}={NONE}."


def meet(env: LaunchEnvironment) -> dist.Store:
    """Return the store of this launch once all ranks have reached it. All ranks.

    After 10 s, rank 0 prints which ranks it waits for, and the first rank of a machine that cannot reach the store
    prints the address. A group of one rank gets a store without an address. Raises UserError if the environment has no
    address, and if a rank is missing after `env.join_timeout_s`.
    """
    if env.world_size == 1:
        return dist.HashStore()
    address, port = _address(env)
    where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
    if env.address_source not in ("", "MASTER_ADDR"):
        where = f"{address}:{port} (set MASTER_ADDR and MASTER_PORT for another)"
    limit = timedelta(seconds=env.join_timeout_s)
    is_host = env.rank == 0 and not env.uses_agent_store
    if is_host:  # both are checked here, because torch's own attempts print stack traces
        _allow_connections(env.world_size)
        _wait(lambda: [] if _is_known(address) else [f"a host of the name {address}"], env, where)
    elif not env.uses_agent_store:
        _wait(lambda: [] if _listens(address, port) else ["rank 0"], env, where, prints=env.local_rank == 0)
    try:
        # One prefix per attempt and run, so that no rank finds keys of an earlier worker group or an earlier run. A
        # store of rank 0's own is new in each attempt, which machines may count differently.
        base = _open_store(address, port, is_host=is_host, limit=limit)
        attempt = env.attempt if env.uses_agent_store else 0
        store = dist.PrefixStore(f"attempt{attempt}/run{next(_RUN_NUMBERS)}", base)
        store.set(_joined(env.rank), "")
        if env.rank == 0:
            _wait(lambda: _missing(store, env.world_size), env, where)
            store.set(_MET, "")
        else:
            store.wait([_MET], limit)
    except dist.DistError as error:
        reason = str(error).strip().partition("\n")[0].partition(" Exception raised from")[0].rstrip(". ")
        if is_host:
            raise UserError(f"rank 0 cannot listen at {where}: {reason}. Choose another port.") from error
        raise UserError(
            f"rank {env.rank} could not connect to the others at {where}: {reason}. {_advice(env)}"
        ) from error
    return store


@contextmanager
def ended_after(env: LaunchEnvironment) -> Iterator[None]:
    """End this process with a message if what is done within takes longer than `env.join_timeout_s`."""

    def end() -> None:
        text = (
            f"error: rank {env.rank} waited {env.join_timeout_s} s to be connected with the other ranks, of which one "
            f"is gone or cannot be reached. The same command resumes from the last checkpoint, if there is one."
        )
        print(text, file=sys.stderr, flush=True)
        os._exit(EXIT_OTHER_ERROR)

    timer = threading.Timer(env.join_timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@cache
def _open_store(address: str, port: int, *, is_host: bool, limit: timedelta) -> dist.Store:
    """Return the store at an address. Cached for the next run of this process: on rank 0 it may be the server."""
    return dist.TCPStore(address, port, is_master=is_host, timeout=limit, wait_for_workers=False, multi_tenant=True)


def _address(env: LaunchEnvironment) -> tuple[str, int]:
    """Return the store's address. Raises UserError if the environment has none."""
    if env.master_addr and env.master_port is not None:
        return env.master_addr, env.master_port
    values = {"MASTER_ADDR": env.master_addr, "MASTER_PORT": env.master_port}
    unset = " and ".join(name for name, value in values.items() if not value)
    if env.is_found:
        raise UserError(
            f"{env.launcher} does not say on which machine rank 0 runs: set {unset} to its name, and the same on all "
            f"ranks. {_FOR_ONE}"
        )
    raise UserError(
        f"{env.named_ranks} are set, but no address: set {unset}, or start all ranks "
        f"with `shardlaunch run RECIPE --ranks {env.world_size}` or torchrun. For one process, unset RANK and "
        f"WORLD_SIZE."
    )


def _is_known(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError):
        return False
    return True


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=MESSAGE_AFTER_S).close()
    except (OSError, UnicodeError):
        return False
    return True


def _wait(missing: Callable[[], list[str]], env: LaunchEnvironment, where: str, *, prints: bool = True) -> None:
    """Wait until no rank is missing. Raises UserError after `env.join_timeout_s`."""
    started, has_printed = time.monotonic(), False
    while names := missing():
        waited_s = time.monotonic() - started
        who = some(names) if len(names) < 2 else f"{len(names)} of {env.world_size} ranks: {some(names)}"
        if waited_s >= env.join_timeout_s:
            raise UserError(f"rank {env.rank} waited {env.join_timeout_s} s at {where} for {who}. {_advice(env)}")
        if prints and not has_printed and waited_s >= min(MESSAGE_AFTER_S, env.join_timeout_s / 2):
            limit = f"at most {env.join_timeout_s} s ({JOIN_TIMEOUT_VARIABLE})"
            print(f"rank {env.rank} waits at {where} for {who}; {limit}", file=sys.stderr, flush=True)
            has_printed = True
        time.sleep(POLL_INTERVAL_S)


def _missing(store: dist.Store, num_ranks: int) -> list[str]:
    """Return the ranks that are not there, by names."""
    ranks = range(num_ranks)
    if store.check([_joined(rank) for rank in ranks]):  # of all in one question
        return []
    return [f"rank {rank}" for rank in ranks if not store.check([_joined(rank)])]


def _allow_connections(num_ranks: int) -> None:
    """Let this process have the connections of all ranks to its store. Raises UserError if the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CONNECTIONS_PER_RANK * num_ranks + OTHER_FILES
    if resource.RLIM_INFINITY not in (soft, hard) and hard < needed:
        raise UserError(
            f"rank 0 needs about {needed} open files for the connections of {num_ranks} ranks, and its limit is {hard} "
            f"(ulimit -Hn). Raise it, or use fewer ranks."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _joined(rank: int) -> str:
    return f"shardlaunch/joined/{rank}"


def _advice(env: LaunchEnvironment) -> str:
    for_one = _FOR_ONE if env.is_found else "For one process, unset RANK and WORLD_SIZE."
    return (
        f"{env.named_ranks} mean {env.world_size} processes: start them all with the same address, or set "
        f"{JOIN_TIMEOUT_VARIABLE} to wait longer. {for_one}"
    )

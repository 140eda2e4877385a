"""How the ranks of a launch meet: at a store that all of them reach, with a wait that says for whom."""

import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import count

import torch.distributed as dist

from shardlaunch.errors import UserError, some
from shardlaunch.sharding.environment import JOIN_TIMEOUT_VARIABLE, LaunchEnvironment

NOTICE_S = 10.0  # of waiting before it is said
LOOK_EVERY_S = 0.05
_MET = "shardlaunch/met"
_RUN_NUMBERS = count()


def meet(env: LaunchEnvironment) -> dist.Store:
    """Return the store of this launch when all its ranks have reached it. All ranks.

    After 10 s of waiting, rank 0 prints for which ranks, and the first rank of a machine that cannot reach the store
    where it tries. A group of one has a store of its own. Raises UserError when the environment names no address, and
    when a rank is missing after `env.join_timeout_s`.
    """
    if env.world_size == 1:
        return dist.HashStore()
    address, port = _address(env)
    where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
    limit = timedelta(seconds=env.join_timeout_s)
    is_host = env.rank == 0 and not env.uses_agent_store
    if not is_host and not env.uses_agent_store:  # asked here, because torch's own attempts write stack traces
        _wait(lambda: [] if _listens(address, port) else ["rank 0"], env, where, speaks=env.local_rank == 0)
    try:
        # Of this attempt and this run: nobody may meet addresses of an earlier worker group, or run of this process.
        base = _open_store(address, port, is_host=is_host, limit=limit)
        store = dist.PrefixStore(f"attempt{env.attempt}/run{next(_RUN_NUMBERS)}", base)
        store.set(_joined(env.rank), "")
        if env.rank == 0:
            ranks = range(env.world_size)
            _wait(lambda: [f"rank {rank}" for rank in ranks if not store.check([_joined(rank)])], env, where)
            store.set(_MET, "")
        else:
            store.wait([_MET], limit)
    except dist.DistError as error:
        reason = str(error).strip().partition("\n")[0].partition(" Exception raised from")[0].rstrip(". ")
        if is_host:
            raise UserError(f"rank 0 cannot listen at {where}: {reason}. Choose another port.") from error
        raise UserError(f"rank {env.rank} did not meet the others at {where}: {reason}. {_ways_out(env)}") from error
    return store


@cache
def _open_store(address: str, port: int, *, is_host: bool, limit: timedelta) -> dist.Store:
    """Return the store at an address. Kept for the next run of this process: on rank 0 it may be the server itself."""
    return dist.TCPStore(address, port, is_master=is_host, timeout=limit, wait_for_workers=False, multi_tenant=True)


def _address(env: LaunchEnvironment) -> tuple[str, int]:
    """Return where the ranks meet."""
    if env.master_addr and env.master_port is not None:
        return env.master_addr, env.master_port
    values = {"MASTER_ADDR": env.master_addr, "MASTER_PORT": env.master_port}
    unset = " and ".join(name for name, value in values.items() if not value)
    raise UserError(
        f"RANK={env.rank} and WORLD_SIZE={env.world_size} are set, but not where the ranks meet: set {unset}, or start "
        f"all ranks with `shardlaunch run RECIPE --ranks {env.world_size}` or torchrun. For one process, unset RANK "
        f"and WORLD_SIZE."
    )


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=NOTICE_S).close()
    except OSError:
        return False
    return True


def _wait(missing: Callable[[], list[str]], env: LaunchEnvironment, where: str, *, speaks: bool = True) -> None:
    """Wait until nobody is missing. Raises UserError when somebody still is at the end of the time."""
    begun, is_said = time.monotonic(), False
    while names := missing():
        waited_s = time.monotonic() - begun
        who = some(names) if len(names) < 2 else f"{len(names)} of {env.world_size} ranks: {some(names)}"
        if waited_s >= env.join_timeout_s:
            raise UserError(f"rank {env.rank} waited {env.join_timeout_s} s at {where} for {who}. {_ways_out(env)}")
        if speaks and not is_said and waited_s >= min(NOTICE_S, env.join_timeout_s / 2):
            limit = f"at most {env.join_timeout_s} s ({JOIN_TIMEOUT_VARIABLE})"
            print(f"rank {env.rank} waits at {where} for {who}; {limit}", file=sys.stderr, flush=True)
            is_said = True
        time.sleep(LOOK_EVERY_S)


def _joined(rank: int) -> str:
    return f"shardlaunch/joined/{rank}"


def _ways_out(env: LaunchEnvironment) -> str:
    return (
        f"RANK={env.rank} and WORLD_SIZE={env.world_size} ask for {env.world_size} processes: start them all, with the "
        f"same address, or set {JOIN_TIMEOUT_VARIABLE} to wait longer. For one process, unset RANK and WORLD_SIZE."
    )

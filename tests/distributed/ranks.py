"""Run a function on N ranks: real processes, a real process group over gloo (or another backend's devices)."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 300

# Processes are forked from a server that has loaded the libraries and run nothing: one starts in a tenth of a second.
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.distributed.preloaded"])


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on each rank as a launcher would start it; return the results by rank.

    `function` stands at the top of a module. Raises AssertionError with the traceback of a rank that failed.
    """
    port = free_port()
    pipes = [FORKING.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        FORKING.Process(target=_rank, args=(rank, num_ranks, port, sender, function, args))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        answers = [_answer(receiver) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    failed = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
    assert not failed, "\n".join(failed)
    return [result for result, _ in answers]


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables that a launcher sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_workers_as_usual() -> None:
    """Let this process fork its own, as one that a launcher starts would, and not start a fork server for them."""
    multiprocessing.set_start_method(None, force=True)


def _answer(receiver: Connection) -> tuple[Any, str]:
    if not receiver.poll(TIMEOUT_S):
        return None, f"no answer within {TIMEOUT_S} s"
    try:
        answer: tuple[Any, str] = receiver.recv()
    except EOFError:
        return None, "ended without an answer"
    return answer


def _rank(
    rank: int, num_ranks: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= rank_environment(rank, num_ranks, port)
    start_workers_as_usual()
    try:
        sender.send((function(*args), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    sender.close()
    os._exit(0)

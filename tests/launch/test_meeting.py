"""Ranks started by hand that do not connect: messages name the settings and the missing ranks."""

import socket
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from shardlaunch.sharding.neighbours import this_place
from tests.launch.command import PLAIN, PYTHON, TRACEBACK, end_of, environment, forked, forked_end_of

WORDS = (*PYTHON, PLAIN)


def free_port() -> str:
    """Return a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "127.0.0.1"}, {"MASTER_PORT": "29500"}], ids=str)
def test_no_address(variables: dict[str, str], tmp_path: Path) -> None:
    extra = {"RANK": "0", "WORLD_SIZE": "2", **variables}
    ended = forked_end_of([*WORDS, "--output-dir", str(tmp_path / "out")], environment(tmp_path, extra))
    assert ended.status == 2, ended.both
    assert ended.err.count("\n") == 1, ended.both
    for text in ("RANK=0 and WORLD_SIZE=2", "shardlaunch run RECIPE --ranks 2", "unset RANK"):
        assert text in ended.err
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        assert (name in ended.err) == (name not in variables)


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SHARDLAUNCH_JOIN_TIMEOUT_S": "3"}
    extra = {"RANK": "0", "WORLD_SIZE": "3", **where}
    ended = end_of([*WORDS, "--output-dir", str(tmp_path / "out")], environment(tmp_path, extra))
    assert ended.status == 2, ended.both
    assert TRACEBACK not in ended.err
    notice, message = ended.err.splitlines()
    who = f"at 127.0.0.1:{where['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT) for 2 of 3 ranks: rank 1, rank 2"
    assert notice == f"rank 0 waits {who}; at most 3 s (SHARDLAUNCH_JOIN_TIMEOUT_S)"
    assert message.startswith(f"error: rank 0 waited 3 s {who}. ")
    assert "SHARDLAUNCH_JOIN_TIMEOUT_S" in message


@pytest.mark.parametrize("has_place", [False, True])
def test_a_rank_that_is_lost_once_it_has_come(has_place: bool, tmp_path: Path) -> None:
    port = free_port()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SHARDLAUNCH_JOIN_TIMEOUT_S": "3"}
    env = environment(tmp_path, {"RANK": "0", "WORLD_SIZE": "2", **where})
    with forked([*WORDS, "--output-dir", str(tmp_path / "out")], env) as run:
        store = dist.TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
        in_run = dist.PrefixStore("attempt0/run0", store)
        in_run.set("shardlaunch/joined/1", "")
        if has_place:
            in_run.set("shardlaunch/place/1", this_place(use_cuda=False).text())
        ended = run.end()
    assert ended.status == 1, ended.both
    assert TRACEBACK not in ended.err
    # Which of the two is noticed first, where the other has said where it runs, is open.
    says = ("error: lost contact with another rank", *(["error: rank 0 waited 3 s to be connected"] * has_place))
    assert ended.err.splitlines()[-1].startswith(says), ended.both


def test_rank_0_that_comes_late(tmp_path: Path) -> None:
    """Rank 1 prints that it waits and runs once rank 0 is there; torch's own messages are not printed."""
    words = [*WORDS, "--output-dir", str(tmp_path / "out")]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SHARDLAUNCH_JOIN_TIMEOUT_S": "60"}
    env = environment(tmp_path, {"RANK": "1", "WORLD_SIZE": "2", **where})
    with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        line = waiting.stderr.readline()
        ended = forked_end_of(words, environment(tmp_path, {"RANK": "0", "WORLD_SIZE": "2", **where}))
        rest = waiting.stderr.read()
    assert line.startswith(f"rank 1 waits at 127.0.0.1:{where['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT) for rank 0;")
    assert rest == ""
    assert (ended.status, waiting.returncode) == (0, 0), ended.both


def test_one_rank_needs_no_address(tmp_path: Path) -> None:
    extra = {"RANK": "0", "WORLD_SIZE": "1"}
    ended = forked_end_of([*WORDS, "--output-dir", str(tmp_path / "out")], environment(tmp_path, extra))
    assert ended.status == 0, ended.both

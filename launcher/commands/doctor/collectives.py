"""How fast ranks of this machine sum tensors: measured between processes that meet as those of a run do."""

import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardlaunch.launcher.commands.ckpt.output import size
from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem

SIZES = (1024, 2**20, 32 * 2**20)
MEASURED_S = 0.7  # per size
MOST_TIMES = 200
LIMIT_S = 12.0  # from the start of the processes to the last figure
_SLOW_LATENCY_S = 5e-3
_RANKS = "from shardlaunch.launcher.commands.doctor.collectives import run_ranks; run_ranks()"
_BUILD_PLACE = re.compile(r"\[enforce fail at [^\]]*\] ")  # where gloo was built
_VARIABLE = "SHARDLAUNCH_DOCTOR"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The median time of a sum over all ranks."""

    num_bytes: int
    seconds: float
    times: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The times of sums, or why there are none."""

    timings: Sequence[Timing] = ()
    why: str = ""
    is_busy: bool = False
    """The machine has not even started the ranks in time."""


def measure(
    *, ranks: int, use_cuda: bool, limit_s: float = LIMIT_S, measured_s: float = MEASURED_S, code: str = _RANKS
) -> Measured:
    """Start ranks, let them sum tensors, and return the times, or why there are none.

    They end after `limit_s`, and measure each size for about `measured_s`. `code` is their program.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        said = {"ranks": ranks, "port": port, "folder": name, "cuda": use_cuda, "measured_s": measured_s}
        said["limit_s"] = limit_s
        environment = {**os.environ, _VARIABLE: json.dumps(said), "OMP_NUM_THREADS": "1"}
        with open(folder / "error", "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        answer = folder / "answer"
        if answer.exists():
            return Measured(timings=[Timing(**one) for one in json.loads(answer.read_text())])
        if status is None and not (folder / "started").exists():
            return Measured(why=f"torch was not loaded in {limit_s:.0f} s", is_busy=True)
        if status is None:
            return Measured(why=f"the ranks were not done after {limit_s:.0f} s")
        texts = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("error*"))]
        lines = next((text.splitlines() for text in texts if text), [f"status {status}"])
        return Measured(why=_BUILD_PLACE.sub("", lines[-1]))


def run_ranks() -> None:
    """Be all ranks: processes forked from this one, which has loaded the libraries."""
    said = json.loads(os.environ[_VARIABLE])
    from shardlaunch.sharding import world  # noqa: F401 - and torch, once for all

    folder = Path(said["folder"])
    (folder / "started").touch()
    for rank in range(said["ranks"]):
        if os.fork() == 0:
            _be_rank(rank, said, folder)
    failed = 0
    for _ in range(said["ranks"]):
        failed = failed or os.wait()[1]
        if failed:
            break  # the others may wait for it; the caller ends them
    os._exit(1 if failed else 0)


def _be_rank(rank: int, said: dict[str, Any], folder: Path) -> None:
    """Measure as one rank, and end the process: at the latest when the caller would have ended it."""
    descriptor = os.open(folder / f"error-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.alarm(math.ceil(said["limit_s"]) + 1)
    try:
        timings = sum_on_ranks(rank, said["ranks"], said["port"], use_cuda=said["cuda"], measured_s=said["measured_s"])
        if rank == 0:
            (folder / "part").write_text(json.dumps([asdict(one) for one in timings]))
            (folder / "part").rename(folder / "answer")
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def sum_on_ranks(rank: int, ranks: int, port: int, *, use_cuda: bool, measured_s: float) -> list[Timing]:
    """Join the other ranks and return how long sums take. All ranks."""
    import torch

    from shardlaunch.sharding.environment import LaunchEnvironment
    from shardlaunch.sharding.world import connect, disconnect

    env = LaunchEnvironment(
        rank=rank,
        world_size=ranks,
        local_rank=rank,
        local_world_size=ranks,
        is_distributed=True,
        master_addr="127.0.0.1",
        master_port=port,
        use_cpu=not use_cuda,
        join_timeout_s=10,
    )
    world = connect(env)

    def seconds_of(tensor: torch.Tensor) -> float:
        began = time.perf_counter()
        world.sum(tensor)
        if use_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timings = []
    for num_bytes in SIZES:
        tensor = torch.zeros(num_bytes // 4, device=world.device)
        first = min(seconds_of(tensor) for _ in range(3))
        slowest = torch.tensor([first], dtype=torch.float64, device=world.device)
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)  # all ranks count alike
        times = max(3, min(MOST_TIMES, int(measured_s / max(1e-9, slowest.item()))))
        seconds = [seconds_of(tensor) for _ in range(times)]
        timings.append(Timing(num_bytes=num_bytes, seconds=statistics.median(seconds), times=times))
    disconnect(world)
    return timings


def check_collectives(
    *,
    ranks: int,
    use_cuda: bool,
    num_parameters: int,
    measured: Callable[..., Measured] = measure,
) -> tuple[list[Finding], dict[str, Any]]:
    """Return how fast sums are, and what those of a step of ddp take. `num_parameters` is 0 if unknown."""
    library = "NCCL" if use_cuda else "gloo"
    found = measured(ranks=ranks, use_cuda=use_cuda)
    timings = found.timings
    if found.is_busy:
        return [note(f"not measured: {found.why}", "try again when less goes on here")], {}
    if not timings:
        return [
            problem(
                f"{ranks} ranks of this machine cannot sum a tensor with {library}: {found.why}",
                "see the findings on the network; NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME may help",
            )
        ], {}
    findings = [ok(f"sums over {ranks} ranks with {library}: {', '.join(map(_text, timings))}")]
    latency = timings[0].seconds
    if latency > _SLOW_LATENCY_S:
        findings.append(
            note(
                f"the smallest sum takes {_time(latency)}: ranks wait for cores, or for a network",
                "start fewer ranks than cores; see GLOO_SOCKET_IFNAME",
            )
        )
    figures: dict[str, Any] = {"all_reduce": [asdict(one) for one in timings], "library": library}
    if num_parameters:
        num_bytes = 4 * num_parameters
        seconds = latency + num_bytes * timings[-1].seconds / timings[-1].num_bytes
        figures["ddp_step_s"] = seconds
        findings.append(
            ok(f"under ddp, a step sums {size(num_bytes)} of gradients: about {_time(seconds)}, partly during backward")
        )
    return findings, figures


def _text(timing: Timing) -> str:
    is_large = timing.num_bytes >= 2**20
    speed = f" ({size(int(timing.num_bytes / timing.seconds))}/s)" if is_large else ""
    shown = f"{timing.num_bytes // 2**20} MiB" if is_large else f"{timing.num_bytes // 1024} KiB"
    return f"{shown} {_time(timing.seconds)}{speed}"


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:,.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:,.1f} ms"
        if seconds < 1
        else f"{seconds:.1f} s"
    )

"""How fast ranks of this machine sum tensors: measured between processes that meet as those of a run do."""

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardlaunch.launcher.commands.ckpt.output import size
from shardlaunch.launcher.commands.doctor.findings import Finding, ok, problem

SIZES = (1024, 2**20, 32 * 2**20)
MEASURED_S = 0.7  # per size
MOST_TIMES = 200
LIMIT_S = 12.0  # from the start of the processes to the last figure
_SLOW_LATENCY_S = 5e-3
_RANK = "from shardlaunch.launcher.commands.doctor.collectives import run_rank; run_rank()"
_BUILD_PLACE = re.compile(r"\[enforce fail at [^\]]*\] ")  # where gloo was built
_VARIABLE = "SHARDLAUNCH_DOCTOR_RANK"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The median time of a sum over all ranks."""

    num_bytes: int
    seconds: float
    times: int


def measure(*, ranks: int, use_cuda: bool, limit_s: float = LIMIT_S, code: str = _RANK) -> tuple[list[Timing], str]:
    """Start ranks, let them sum tensors, and return the times, and why there are none. `code` is a rank's program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ended = _run(code, ranks, port, Path(folder), use_cuda=use_cuda, limit_s=limit_s)
        answer = Path(folder) / "answer"
        if answer.exists():
            return [Timing(**one) for one in json.loads(answer.read_text())], ""
        return [], ended


def _run(code: str, ranks: int, port: int, folder: Path, *, use_cuda: bool, limit_s: float) -> str:
    """Run the processes, and end them. Return why one failed."""
    processes = []
    paths = [folder / f"error-{rank}" for rank in range(ranks)]
    try:
        for rank, path in enumerate(paths):
            said = json.dumps({"rank": rank, "ranks": ranks, "port": port, "folder": str(folder), "cuda": use_cuda})
            with open(path, "wb") as stream:
                environment = {**os.environ, _VARIABLE: said, "OMP_NUM_THREADS": "1"}
                words = [sys.executable, "-c", code]
                processes.append(
                    subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
                )
        end = time.monotonic() + limit_s
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.02)
        codes = [process.poll() for process in processes]
    except OSError as error:
        return f"a process cannot be started: {error.strerror}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = next((rank for rank, code in enumerate(codes) if code), None)
    if failed is None:
        return f"the ranks were not done after {limit_s:.0f} s"
    lines = _BUILD_PLACE.sub("", paths[failed].read_text(errors="replace")).strip().splitlines()
    return f"rank {failed} failed: {lines[-1] if lines else f'status {codes[failed]}'}"


def run_rank() -> None:
    """Be one of the ranks."""
    said = json.loads(os.environ[_VARIABLE])
    timings = sum_on_ranks(said["rank"], said["ranks"], said["port"], use_cuda=said["cuda"])
    if said["rank"] == 0:
        staged = Path(said["folder"]) / "answer.part"
        staged.write_text(json.dumps([asdict(one) for one in timings]))
        staged.rename(Path(said["folder"]) / "answer")
    os._exit(0)


def sum_on_ranks(
    rank: int, ranks: int, port: int, *, use_cuda: bool, sizes: Sequence[int] = SIZES, measured_s: float = MEASURED_S
) -> list[Timing]:
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
    for num_bytes in sizes:
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
    measured: Callable[..., tuple[list[Timing], str]] = measure,
) -> tuple[list[Finding], dict[str, Any]]:
    """Return how fast sums are, and what those of a step of ddp take. `num_parameters` is 0 if unknown."""
    library = "NCCL" if use_cuda else "gloo"
    timings, why = measured(ranks=ranks, use_cuda=use_cuda)
    if not timings:
        return [
            problem(
                f"{ranks} ranks of this machine cannot sum a tensor with {library}: {why}",
                "see the findings on the network; NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME may help",
            )
        ], {}
    findings = [ok(f"sums over {ranks} ranks with {library}: {', '.join(map(_text, timings))}")]
    latency = timings[0].seconds
    if latency > _SLOW_LATENCY_S:
        findings.append(
            problem(
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

"""For how long a save stops the training, and how much slower steps are while it is written.

    python benchmarks/checkpoint_stall.py                          # one rank
    torchrun --nproc_per_node 2 benchmarks/checkpoint_stall.py     # two ranks on gloo

The state is that of benchmarks/checkpoint_io.py. "stall" is the time until the training can go on:
a plain copy of the bytes that the rank writes, into memory that is there; our save beside the training, which is that
copy and the start of a thread; our save for which the training waits; torch.distributed.checkpoint.async_save;
accelerate's save_state, for which the training waits as well. "step" is a forward and backward pass of about 20 ms on
one thread: its median and its 99th percentile within a round, without a save and while one is written beside it.

All arms take turns, in another order each round; a save is over before the next begins. Ratios are medians of those
within a round: of stalls to the copy, of steps to those without a save.
"""

import argparse
import gc
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_arms import Bench, fragments, save_ours
from record import machine, versions, write_result
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import async_save

from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.shares import Snapshots, share_of
from shardlaunch.checkpoints.writer import save
from shardlaunch.launcher.runs.background import Background
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import World, connect, disconnect

COPY, BESIDE, WAITING, DCP, ACCELERATE = (
    "plain copy in memory",
    "ours, beside the training",
    "ours, the training waits",
    "torch.distributed.checkpoint.async_save",
    "accelerate",
)
NO_SAVE = "no save"
LEAST_STEPS = 50  # of a round, so that a percentile means something

Save = Callable[[Path], Callable[[], object]]
"""Begins to save to a folder, and returns what waits until that is done."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table. All ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.3, help="size of the state")
    parser.add_argument("--rounds", type=int, default=20, help="how often each arm takes its turn")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the arms")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure")
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    args = parser.parse_args(argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    world = connect(read_environment(), needs_group=True)  # async_save needs one
    held = fragments(args.gigabytes, rank=world.rank, num_ranks=world.size)
    bench = Bench(world=world, gigabytes=args.gigabytes, held=held)
    arms = _arms(bench)
    folder = Path(args.dir) / f"checkpoint-stall-{_of_main(os.getpid(), world)}"
    if world.is_main:
        folder.mkdir()
    try:
        stalls, steps = _rounds(arms, world, folder, args)
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if world.is_main:
        _report(stalls, steps, world, args)
    disconnect(world)


def _arms(bench: Bench) -> dict[str, Save]:
    world, held = bench.world, bench.held
    share = share_of(held, rank=world.rank, num_ranks=world.size)
    copies = [torch.empty_like(piece.values) for piece in share.pieces]
    snapshots, background = Snapshots(), Background()
    state = bench.dcp_state()
    accelerate = bench.accelerate()
    assert accelerate.save is not None

    def copy(folder: Path) -> Callable[[], object]:
        for piece, into in zip(share.pieces, copies, strict=True):
            into.copy_(piece.values)
        return lambda: None

    def beside(folder: Path) -> Callable[[], object]:
        copied = snapshots.of(share_of(held, rank=world.rank, num_ranks=world.size))
        position, peers = Position(step=1), world.background_peers
        background.start(
            lambda: save(folder, position=position, share=copied, export=lambda _: None, aliases={}, peers=peers),
            name="save",
        )
        return background.wait

    def waiting(folder: Path) -> Callable[[], object]:
        save_ours(folder, held, world.peers)
        return lambda: None

    def dcp(folder: Path) -> Callable[[], object]:
        future: Any = async_save(state, checkpoint_id=folder, process_group=world.host_group)
        return future.result

    def of_accelerate(folder: Path) -> Callable[[], object]:
        assert accelerate.save is not None
        accelerate.save(folder)
        return lambda: None

    return {COPY: copy, BESIDE: beside, WAITING: waiting, DCP: dcp, ACCELERATE: of_accelerate}


class _Work:
    """A step of training that takes about 20 ms on one thread."""

    def __init__(self) -> None:
        self._model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
        self._inputs = torch.randn(64, 512)
        seconds = min(self.step() for _ in range(5))
        self._inputs = torch.randn(max(1, round(64 * 0.02 / seconds)), 512)

    def step(self) -> float:
        begin = time.perf_counter()
        self._model.zero_grad()
        self._model(self._inputs).square().mean().backward()
        return time.perf_counter() - begin


def _rounds(
    arms: dict[str, Save], world: World, folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    order, work = random.Random(args.seed), _Work()
    stalls: dict[str, list[float]] = {name: [] for name in arms}
    steps: dict[str, list[list[float]]] = {NO_SAVE: [], BESIDE: [], DCP: []}
    names = [*arms, NO_SAVE]
    for number in range(-1, args.rounds):  # the first one warms up
        if world.is_main:
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        order.shuffle(names)
        for name in names:
            gc.collect()
            dist.barrier()
            if name == NO_SAVE:
                found = [work.step() for _ in range(2 * LEAST_STEPS)]
            else:
                begin = time.perf_counter()
                wait = arms[name](folder / name.replace(" ", "-"))
                stall = time.perf_counter() - begin
                found = [work.step() for _ in range(LEAST_STEPS)] if name in steps else []
                wait()
                dist.barrier()
                if world.is_main:
                    shutil.rmtree(folder / name.replace(" ", "-"), ignore_errors=True)
                    os.sync()
                if number >= 0:
                    stalls[name].append(stall)
            if number >= 0 and name in steps:
                steps[name].append(found)
    return stalls, steps


def _report(
    stalls: dict[str, list[float]], steps: dict[str, list[list[float]]], world: World, args: argparse.Namespace
) -> None:
    rows = [_row(f"stall: {name}", figures, stalls[COPY]) for name, figures in stalls.items()]
    for title, part in (("median", 0.5), ("99 %", 0.99)):
        of_arm = {name: [_percentile(found, part) for found in rounds] for name, rounds in steps.items()}
        rows += [_row(f"step, {title}: {name}", figures, of_arm[NO_SAVE]) for name, figures in of_arm.items()]
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(
            f"{row['name']:{width}}  {row['median']:7.1f} ms [{row['least']:.1f}, {row['most']:.1f}]  x {row['x_raw']}"
        )
    if args.result:
        launcher = "python" if world.size == 1 else f"torchrun --nproc_per_node {world.size}"
        result = {
            "benchmark": "checkpoint_stall",
            "command": f"{launcher} benchmarks/checkpoint_stall.py",
            "ranks": world.size,
            "unit": "milliseconds",
            "ratio": "x copy, or no save",
            "rounds": args.rounds,
            "rows": rows,
            "versions": versions("torch", "accelerate"),
            "machine": machine(),
            "note": "",
        }
        write_result(args.result, result)


def _row(name: str, seconds: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    ratio = statistics.median(one / other for one, other in zip(seconds, base, strict=True))
    figures = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {"name": name, **{key: round(1e3 * value, 1) for key, value in figures.items()}, "x_raw": round(ratio, 2)}


def _percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def _of_main(value: int, world: World) -> int:
    return world.peers.gather([value])[0][0]


if __name__ == "__main__":
    main()

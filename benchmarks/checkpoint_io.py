"""What a durable save and a load cost beside other ways to keep the same state, and beside the bare disk.

    python benchmarks/checkpoint_io.py                          # one rank
    torchrun --nproc_per_node 2 benchmarks/checkpoint_io.py     # two ranks on gloo; with --memory: peaks of memory

The state: a GPT's parameters in fp32 with AdamW's exp_avg, exp_avg_sq and step. On several ranks each holds shards
along dimension 0, as FSDP2 does (DTensors for torch.distributed.checkpoint); for accelerate it is DDP, its default:
each rank holds all, and rank 0 writes.

Save: every arm ends durable. After another's save, its files and folder are fsynced (the ranks share the files);
"before fsync" is when its own call came back. Ours includes digests, fsync, manifest and rename. "raw" writes the same
bytes of the same tensors, one file per rank, in chunks of 16 MiB, and fsyncs file and folder.
Load: into the tensors that the rank holds, from a folder that the arm wrote before the first round. Ours includes the
check of every digest. The page cache of the files is dropped before each load (POSIX_FADV_DONTNEED; a virtual disk may
have another cache beneath). Checkpoints of other numbers of ranks are written by a launch of that many.

All arms take turns, saves and loads mixed, in another order each round; each load is checked. "x raw" and "x ours" are
medians of the ratios within a round, which an uneven machine disturbs less than the seconds. Before each measurement
every rank takes and frees memory, for a virtual machine may have to fetch free pages from its host first.
"""

import argparse
import ctypes
import gc
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_arms import OURS, RAW, Arm, Bench, fragments, fsync, save_ours
from record import machine, versions, write_result

from shardlaunch.checkpoints.state import Fragment
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import World, available_cores, connect, disconnect

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table. All ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.3, help="size of the state")
    parser.add_argument("--rounds", type=int, default=10, help="how often each arm saves and loads")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the arms")
    parser.add_argument("--written-by", type=int, nargs="*", default=[1, 2, 4], help="load what so many ranks wrote")
    parser.add_argument("--memory", action="store_true", help="measure peaks of memory, not time")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure")
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    parser.add_argument("--write-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    world = connect(read_environment())
    held = fragments(args.gigabytes, rank=world.rank, num_ranks=world.size)
    if args.write_only:
        save_ours(args.write_only, held, world.peers)
    else:
        with _shared_folder(args, world) as folder:
            arms = _prepare(Bench(world=world, gigabytes=args.gigabytes, held=held), folder, args)
            report = (_memory if args.memory else _rounds)(arms, world, folder, args)
        if world.is_main:
            report = _about(args, world) | report
            print("\n".join(f"{key:9}{value}" for key, value in _described(args, world, held).items()))
            if args.result:
                write_result(args.result, report)
    disconnect(world)


@contextmanager
def _shared_folder(args: argparse.Namespace, world: World) -> Iterator[Path]:
    """Give the ranks a folder with room enough, and remove it. All ranks."""
    folder = args.dir / f"checkpoint-io-{_max(os.getpid() if world.is_main else 0)}"
    needed = (7 + len(args.written_by)) * args.gigabytes * 1e9
    free = shutil.disk_usage(args.dir).free
    if free < needed:
        raise SystemExit(f"{args.dir}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed: free some, or set --dir")
    if world.is_main:
        folder.mkdir()
    try:
        yield folder
    finally:
        if world.is_main:
            shutil.rmtree(folder)


def _prepare(bench: Bench, folder: Path, args: argparse.Namespace) -> list[Arm]:
    """Make the arms; let each save once, where its loads find it. All ranks."""
    arms = [bench.raw(), bench.ours(OURS), bench.dcp(), bench.accelerate(), bench.torch_save()]
    for arm in arms:
        _save(arm, bench.world, folder / arm.name)
        arm.save_s.clear()
        arm.returned_s.clear()
    for num_ranks in args.written_by:
        arm = bench.ours(f"ours, written by {num_ranks} rank{'s' * (num_ranks > 1)}")
        arm.save = None
        if bench.world.is_main:
            environ = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCH_VARIABLES)}
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
            options = ["--gigabytes", str(args.gigabytes), "--write-only", str(folder / arm.name)]
            subprocess.run([sys.executable, *launch, __file__, *options], env=environ, check=True)
        _barrier()
        arms.append(arm)
    return arms


def _rounds(arms: Sequence[Arm], world: World, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure each arm's save and load in each round and print the tables. All ranks."""
    order = random.Random(args.seed)
    jobs = [(arm, is_save) for arm in arms for is_save in (True, False) if arm.save or not is_save]
    for number in range(args.rounds):
        if world.is_main:
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        order.shuffle(jobs)
        for arm, is_save in jobs:
            _take_and_free_memory(int(1.5e9 * args.gigabytes / world.size))
            if is_save:
                _save(arm, world, folder / "round")
                _remove(folder / "round", world)
            else:
                _load(arm, world, folder / arm.name)
    if world.is_main:
        print(f"seconds, median [least, most] of {args.rounds} rounds\n")
        savers = [arm for arm in arms if arm.save]
        _print_table("save", [(arm.name, arm.save_s) for arm in savers], [arm.returned_s for arm in savers])
        _print_table("load", [(arm.name, arm.load_s) for arm in arms])
    saves = [(f"save: {arm.name}", arm.save_s, arms[0].save_s) for arm in arms if arm.save]
    loads = [(f"load: {arm.name}", arm.load_s, arms[0].load_s) for arm in arms]
    return {"unit": "seconds", "rounds": args.rounds, "rows": [_row(*row) for row in saves + loads]}


def _save(arm: Arm, world: World, folder: Path) -> None:
    """Save to a new folder, durably. All ranks."""
    assert arm.save
    if world.is_main:
        folder.mkdir()
    _barrier()
    begin = time.perf_counter()
    arm.save(folder)
    _barrier()
    arm.returned_s.append(time.perf_counter() - begin)
    if not arm.is_durable:
        for path in _files(folder)[world.rank :: world.size]:
            fsync(path)
        _barrier()
        if world.is_main:
            fsync(folder)
        _barrier()
    arm.save_s.append(time.perf_counter() - begin)


def _load(arm: Arm, world: World, folder: Path) -> None:
    """Load from a folder and check what came. All ranks."""
    expected = arm.digests()
    for tensor in arm.tensors():
        tensor.zero_()
    for path in _files(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _barrier()
    begin = time.perf_counter()
    arm.load(folder)
    _barrier()
    arm.load_s.append(time.perf_counter() - begin)
    assert arm.digests() == expected, f"{arm.name}: what was loaded is not what was saved"


def _memory(arms: Sequence[Arm], world: World, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak of host memory in each arm's save and load, and print a table. All ranks."""
    figures: dict[str, dict[str, int]] = {}
    for arm in arms:
        row = figures[arm.name] = {"holds": _max(sum(tensor.nbytes for tensor in arm.tensors()))}
        if arm.save:
            row["save"] = _extra_bytes(_save, arm, world, folder / "round")
            _remove(folder / "round", world)
        row["load"] = _extra_bytes(_load, arm, world, folder / arm.name)
    if world.is_main:
        print("MB per rank, the largest of all ranks: what it holds, and the peaks in save and load beyond that\n")
        width = max(len(name) for name in figures)
        print(f"{'':{width}}  {'holds':>8}  {'save':>8}  {'load':>8}")
        for name, row in figures.items():
            cells = (f"{row[key] / 1e6:8.1f}" if key in row else f"{'':8}" for key in ("holds", "save", "load"))
            print(f"{name:{width}}  " + "  ".join(cells))
        print()
    return {"unit": "bytes of host memory per rank", "memory_bytes": figures}


def _extra_bytes(work: Callable[[Arm, World, Path], None], arm: Arm, world: World, folder: Path) -> int:
    """Return by how many bytes the process grows at its peak in `work`, on the rank where it grows most. All ranks."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is needed now
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back (proc(5))
    before = _status_bytes("VmRSS")
    work(arm, world, folder)
    return _max(_status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _print_table(title: str, rows: Sequence[tuple[str, list[float]]], returned: Sequence[list[float]] = ()) -> None:
    seconds = dict(rows)
    width = max(len(name) for name, _ in rows)
    print(f"{title:{width}}  {'':>20}  {'x raw':>6}  {'x ours':>6}  {'before fsync' if returned else '':>20}".rstrip())
    for number, (name, figures) in enumerate(rows):
        line = f"{name:{width}}  {_cell(figures):>20}"
        for base in (RAW, OURS):
            ratios = [one / other for one, other in zip(figures, seconds[base], strict=True)]
            line += f"  {statistics.median(ratios):>6.2f}"
        print(line + (f"  {_cell(returned[number]):>20}" if returned else ""))
    print()


def _cell(seconds: Sequence[float]) -> str:
    middle, least, most = (f(seconds) for f in (statistics.median, min, max))
    return f"{middle:.2f} [{least:.2f}, {most:.2f}]"


def _row(name: str, seconds: Sequence[float], raw: Sequence[float]) -> dict[str, Any]:
    """Return a row that benchmarks/tables.py reads."""
    figures = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    figures["x_raw"] = statistics.median(one / other for one, other in zip(seconds, raw, strict=True))
    return {"name": name, **{key: round(value, 2) for key, value in figures.items()}}


def _about(args: argparse.Namespace, world: World) -> dict[str, Any]:
    launcher = "python" if world.size == 1 else f"torchrun --nproc_per_node {world.size}"
    return {
        "benchmark": "checkpoint_io",
        "command": f"{launcher} benchmarks/checkpoint_io.py{' --memory' * args.memory}",
        "ranks": world.size,
        "versions": versions("torch", "accelerate"),
        "machine": machine(),
        "note": "",
    }


def _described(args: argparse.Namespace, world: World, held: Sequence[Fragment]) -> dict[str, str]:
    disk = subprocess.run(["stat", "-f", "-c", "%T", args.dir], capture_output=True, text=True).stdout.strip()
    total = sum(fragment.spec.num_bytes for fragment in held)
    mine = sum(fragment.tensor.nbytes for fragment in held)
    return {
        "state": f"{total / 1e9:.2f} GB in {len(held)} tensors; rank 0 of {world.size} holds {mine / 1e9:.2f} GB",
        "machine": f"{machine()['cpu']}, {available_cores()} of them here, {disk}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions("torch", "accelerate").items()),
    }


def _max(value: int) -> int:
    """Return the greatest of all ranks' values. All ranks."""
    tensor = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove(folder: Path, world: World) -> None:
    """Remove a folder and let the disk settle, so that the next arm does not pay for it. All ranks."""
    if world.is_main:
        shutil.rmtree(folder)
        os.sync()
    _barrier()


def _take_and_free_memory(num_bytes: int) -> None:
    gc.collect()
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.madvise(mmap.MADV_HUGEPAGE)  # large pages, as the page cache takes them
        for offset in range(0, num_bytes, mmap.PAGESIZE):
            pages[offset] = 1


if __name__ == "__main__":
    main()

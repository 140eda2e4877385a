"""What a run takes to start and end, by number of ranks: python benchmarks/startup_ranks.py [--result NAME].

A tiny run (two layers, two steps, saves beside the training) on 2 to 64 ranks of this machine over gloo,
under DDP and FSDP2. Ranks are forked from a process that has loaded the libraries. Per rank: CPU time from the fork to
the end of the run, and open descriptors in the last step, as a mean and of rank 0, in whose process the store listens.
Arms, which take turns: `full mesh`, where every rank connects to every other one in each process group, as gloo has it;
`on use`, which is what runs have. Without the watchdog, which has one more connection of each rank to the store, and
takes some milliseconds of each second that the ranks wait for each other here, where they share few cores; for that
reason the wall time until the last rank has ended says little.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import machine, versions, write_result

from shardlaunch import Options, Recipe, TensorData, option
from shardlaunch.launcher.launch import main as run
from shardlaunch.launcher.launched import mark_launched

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["shardlaunch.launcher.runs.run", "torch._inductor.compile_fx", "startup_ranks"])
LAZY_VARIABLE = "TORCH_GLOO_LAZY_INIT"
ARMS = {"full mesh": "0", "on use": "1"}
NUM_STEPS = 2


@dataclass(kw_only=True)
class TinyOptions(Options):
    """Options of the tiny recipe."""

    global_batch_size: int = 64
    micro_batch_size: int = 1
    max_steps: int = NUM_STEPS
    save_every: int = 1
    async_save: str = "on"  # with the process group of saves beside the training
    tracker: str = option("none", mark="free")
    threads_per_rank: int = 1


class Tiny(Recipe):
    """Two layers; the last step counts descriptors."""

    options: TinyOptions
    num_descriptors = 0

    def datasets(self) -> Mapping[str, Any]:
        return {"train": TensorData(inputs=torch.ones(128, 4), labels=torch.zeros(128, dtype=torch.int64))}

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if self.moment.step == NUM_STEPS - 1:
            Tiny.num_descriptors = len(os.listdir("/proc/self/fd"))
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--strategies", nargs="*", default=["ddp", "fsdp2"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    mark_launched(Tiny)
    rows = []
    for strategy in args.strategies:
        for num_ranks in args.ranks:
            rounds = [
                {arm: measured(strategy, num_ranks, value) for arm, value in ARMS.items()} for _ in range(args.rounds)
            ]
            for arm in ARMS:
                figures = [found[arm] for found in rounds]
                row = {"strategy": strategy, "ranks": num_ranks, "arm": arm}
                row |= {key: round(statistics.median(one[key] for one in figures), 3) for key in figures[0]}
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.result:
        result = {
            "benchmark": "startup_ranks",
            "command": "python benchmarks/startup_ranks.py",
            "rounds": args.rounds,
            "rows": rows,
            "versions": versions("torch", "numpy"),
            "machine": machine(),
            "note": "",
        }
        write_result(args.result, result)


def measured(strategy: str, num_ranks: int, lazy: str) -> dict[str, float]:
    """Run once, and return the figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        queue = FORKING.Queue()
        ranks = [
            FORKING.Process(target=_rank, args=(rank, num_ranks, port, strategy, lazy, folder, queue))
            for rank in range(num_ranks)
        ]
        begin = time.monotonic()
        for rank in ranks:
            rank.start()
        found = sorted(queue.get(timeout=600) for _ in ranks)
        wall_s = time.monotonic() - begin
        for rank in ranks:
            rank.join()
    return {
        "cpu_s": statistics.mean(cpu_s for _, cpu_s, _ in found),
        "descriptors": statistics.mean(count for _, _, count in found),
        "descriptors_of_first": found[0][2],
        "most_descriptors_of_others": max(count for _, _, count in found[1:]),
        "wall_s": wall_s,
    }


def _rank(rank: int, num_ranks: int, port: int, strategy: str, lazy: str, folder: str, queue: Any) -> None:
    begin = time.process_time()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ[LAZY_VARIABLE] = lazy
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    assert run(Tiny, ["--hang-after-s", "0", "--strategy", strategy, "--output-dir", str(Path(folder) / "out")]) == 0
    queue.put((rank, time.process_time() - begin, Tiny.num_descriptors))
    queue.close()
    queue.join_thread()
    os._exit(0)


if __name__ == "__main__":
    main()

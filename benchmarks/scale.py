"""What planning a save takes, by number of ranks: python benchmarks/scale.py [--result NAME]. No ranks are started.

States: fp32 weights with AdamW's exp_avg, exp_avg_sq and step of a model of 70B parameters in 723 tensors, and of a
mixture of experts in 50,000 tensors. Layouts: `fsdp2`, each rank a shard of every tensor; `hsdp`, replicas that are
each sharded over 64 ranks. Columns: what one rank takes to plan its share and the places of all tensors, from the
fragments that it holds (seconds of CPU, and memory as Python and numpy count it); what it sends; the same for rank 0's
manifest; and the largest share of a rank beside the mean of all.

Tensors are on the meta device: they take no memory.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from record import machine, versions, write_result

from shardlaunch.checkpoints.manifest import Manifest
from shardlaunch.checkpoints.shares import Share, share_of
from shardlaunch.checkpoints.state import MODEL, ONLY, OPTIMIZER, Fragment, Replica, TensorSpec

REPLICA_RANKS = 64  # of hsdp
ENTRIES = ("exp_avg", "exp_avg_sq")
CASES = (
    *(("fsdp2", num_ranks) for num_ranks in (64, 512, 4096, 16384)),
    *(("hsdp", num_ranks) for num_ranks in (512, 4096, 16384)),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    args = parser.parse_args(argv)
    rows = []
    for name, shapes in (("70B, 723 tensors", dense()), ("experts, 50,000 tensors", experts())):
        for layout, num_ranks in CASES:
            row = {"model": name, "layout": layout, "ranks": num_ranks, **measure(shapes, layout, num_ranks)}
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    if args.result:
        result = {
            "benchmark": "scale",
            "command": "python benchmarks/scale.py",
            "rows": rows,
            "versions": versions("torch", "numpy"),
            "machine": machine(),
            "note": "",
        }
        write_result(args.result, result)


def dense() -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama of 70B parameters."""
    width, inner, keys = 8192, 28672, 1024
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (128256, width)}
    for layer in range(80):
        for part, shape in (
            ("q", (width, width)),
            ("k", (keys, width)),
            ("v", (keys, width)),
            ("o", (width, width)),
            ("gate", (inner, width)),
            ("up", (inner, width)),
            ("down", (width, inner)),
            ("norm_1", (width,)),
            ("norm_2", (width,)),
        ):
            shapes[f"layers.{layer}.{part}.weight"] = shape
    return {**shapes, "norm.weight": (width,), "head.weight": (128256, width)}


def experts() -> dict[str, tuple[int, ...]]:
    """Return the shapes of 50,000 tensors: experts of three matrices, 260 in each of 64 layers, and others."""
    width, inner = 2048, 768
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (151936, width)}
    for layer in range(64):
        for expert in range(260):
            for part, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                shapes[f"layers.{layer}.experts.{expert}.{part}.weight"] = shape
    for number in range(50_000 - len(shapes)):
        shapes[f"others.{number}.weight"] = (width,)
    return shapes


def specs_of(shapes: dict[str, tuple[int, ...]]) -> list[TensorSpec]:
    """Return the tensors of the state, in the order of a run's."""
    weights = [TensorSpec(name=name, section=MODEL, shape=shape, dtype=torch.float32) for name, shape in shapes.items()]
    states = [
        TensorSpec(name=name, section=OPTIMIZER, entry=entry, shape=shape, dtype=torch.float32)
        for name, whole in shapes.items()
        for entry, shape in (("step", ()), *((entry, whole) for entry in ENTRIES))
    ]
    return [*weights, *states]


def fragments_of(specs: Sequence[TensorSpec], layout: str, rank: int, num_ranks: int) -> Iterator[Fragment]:
    """Yield what a rank holds: rows of each tensor, and scalars as a whole."""
    shard_ranks = num_ranks if layout == "fsdp2" else REPLICA_RANKS
    shard = rank % shard_ranks
    replica = ONLY if layout == "fsdp2" else Replica(rank // shard_ranks, num_ranks // shard_ranks)
    for spec in specs:
        if not spec.shape:
            yield Fragment(spec=spec, flat_start=0, flat_end=1, tensor=torch.empty((), device="meta"))
            continue
        rows = -(-spec.shape[0] // shard_ranks)
        first, last = (min(spec.shape[0], number * rows) for number in (shard, shard + 1))
        row = spec.num_elements // spec.shape[0]
        held = torch.empty((last - first) * row, device="meta")
        yield Fragment(spec=spec, flat_start=first * row, flat_end=last * row, tensor=held, replica=replica)


def measure(shapes: dict[str, tuple[int, ...]], layout: str, num_ranks: int) -> dict[str, Any]:
    """Return what a plan takes on a rank in the middle, and how evenly the ranks share."""
    specs = specs_of(shapes)
    fragments = list(fragments_of(specs, layout, num_ranks // 2, num_ranks))

    def plan() -> Share:
        share = share_of(fragments, rank=num_ranks // 2, num_ranks=num_ranks)
        for file in share.files:
            list(file.offsets())
        return share

    plan_s, memory_bytes, share = _taken(plan)
    crcs = dict.fromkeys(share.specs, 1)

    def manifest() -> bytes:
        tensors = {spec: file.file_name for file in share.files for spec in file.specs}
        records = {file.file_name: file.record(crcs) for file in share.files}
        return Manifest(step=1, files=records, tensors=tensors, crcs=crcs).to_json()

    manifest_s, _, data = _taken(manifest)
    largest, mean = _shares(specs, layout, num_ranks)
    return {
        "plan_s": round(plan_s, 3),
        "memory_bytes": memory_bytes,
        "sent_bytes": 2 * 8 * len(specs),
        "manifest_s": round(manifest_s, 3),
        "manifest_bytes": len(data),
        "largest_share_bytes": int(largest),
        "mean_share_bytes": int(mean),
    }


def _shares(specs: Sequence[TensorSpec], layout: str, num_ranks: int) -> tuple[float, float]:
    """Return the bytes of the largest share and the mean one: what a rank holds, divided among replicas."""
    shard_ranks = num_ranks if layout == "fsdp2" else REPLICA_RANKS
    held = np.zeros(shard_ranks)
    for spec in specs:
        if spec.shape:
            rows = -(-spec.shape[0] // shard_ranks)
            begins = np.minimum(spec.shape[0], np.arange(shard_ranks + 1) * rows)
            held += np.diff(begins) * (spec.num_bytes // spec.shape[0])
    shares = held / (num_ranks // shard_ranks)
    return shares.max(), shares.mean()


def _taken(work: Callable[[], Any]) -> tuple[float, int, Any]:
    begin = time.process_time()
    work()
    seconds = time.process_time() - begin
    tracemalloc.start()
    result = work()
    memory_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, memory_bytes, result


if __name__ == "__main__":
    main()

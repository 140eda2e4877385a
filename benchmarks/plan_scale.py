"""What planning the batches of an epoch takes, by number of samples: python benchmarks/plan_scale.py [--result NAME].

Rows: the order of runs that began before it had a version, which holds an integer per sample, and the order of today,
each without and with lengths. Lengths are one byte per sample, in a file of which the plan reads what it needs.
Columns: the digest of the plan, which every start takes; the first step; the mean over steps of later blocks, in
another epoch; and the most memory that the plan takes at once, as numpy counts it.
"""

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import machine, versions, write_result

from shardlaunch.launcher.training.batch_plan import BatchPlan
from shardlaunch.launcher.training.batches import slots_of_rank
from shardlaunch.launcher.training.former_order import FormerPlan

GLOBAL_BATCH, MICRO_BATCH, NUM_RANKS = 1024, 8, 64
NUM_STEPS = 500
PART = 1 << 24  # lengths written at once
CASES = (
    ("before", FormerPlan, 1_000_000),
    ("before", FormerPlan, 10_000_000),
    ("now", BatchPlan, 1_000_000),
    ("now", BatchPlan, 1_000_000_000),
)


def measure(kind: type[BatchPlan], num_samples: int, lengths: np.ndarray | None) -> dict[str, float]:
    """Return seconds of CPU and bytes of memory that a plan takes on one of many ranks."""

    def new() -> BatchPlan:
        return kind(
            num_samples=num_samples,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=MICRO_BATCH,
            seed=0,
            lengths=lengths,
        )

    plan = new()
    digest_s = _seconds(plan.digest)
    first_s = _seconds(lambda: _take(plan, 0))
    begin = plan.steps_per_epoch  # of another epoch

    def take_all() -> None:
        for step in range(begin, begin + NUM_STEPS):
            _take(plan, step)

    step_s = _seconds(take_all) / NUM_STEPS
    tracemalloc.start()
    plan = new()
    plan.digest()
    for step in (0, 1, begin - 1, begin):
        _take(plan, step)
    memory_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"digest_s": digest_s, "first_s": first_s, "step_s": step_s, "memory_bytes": memory_bytes}


def _take(plan: BatchPlan, step: int) -> None:
    for _ in slots_of_rank(plan, step, rank=0, num_ranks=NUM_RANKS):
        pass


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=1_000_000_000, help="leave out what has more samples")
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    parser.add_argument("--note", default="", help="what else is to be known, such as work beside the benchmark")
    words = parser.parse_args(argv)
    cases = [case for case in CASES if case[2] <= words.largest]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths"
        _write_lengths(path, max(num_samples for _, _, num_samples in cases))
        lengths = np.memmap(path, np.uint8, mode="r")
        for when, kind, num_samples in cases:
            for of in (None, lengths[:num_samples]):
                figures = measure(kind, num_samples, of)
                rows.append({"when": when, "num_samples": num_samples, "has_lengths": of is not None, **figures})
                print(_line(rows[-1]))
    if words.result:
        result = {
            "benchmark": "plan_scale",
            "command": "python benchmarks/plan_scale.py",
            "rows": rows,
            "versions": versions("numpy"),
            "machine": machine(),
            "note": words.note,
        }
        write_result(words.result, result)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['when']:7} {row['num_samples']:14,} samples, {'with lengths' if row['has_lengths'] else 'no lengths':12}"
        f"  digest {row['digest_s'] * 1e3:8.1f} ms  first step {row['first_s'] * 1e3:8.1f} ms"
        f"  a step {row['step_s'] * 1e6:6.1f} us  memory {row['memory_bytes'] / 1e6:8.2f} MB"
    )


def _write_lengths(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for first in range(0, count, PART):
            file.write(rng.integers(1, 256, min(PART, count - first), dtype=np.uint8).tobytes())


if __name__ == "__main__":
    main()

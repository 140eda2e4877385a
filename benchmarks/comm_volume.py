"""What ranks send per step, counted by the kernel, beside what the strategy must send.

    python benchmarks/comm_volume.py

`benchmarks/volume/blocks.py`, 4.2 M parameters in 8 blocks, fp32, one micro-batch per rank or two. Each run is on the
CPU in a network namespace of its own (Linux, root), whose loopback device counts the bytes of all ranks, with headers,
repetitions and all that is said beside the gradients; two runs of different lengths give those of a step. The theory,
in numbers over all of N ranks: a sum of P gradients takes 2 (N - 1) P, in a ring or by halves; gathering P weights, or
summing each part of P gradients on one rank, (N - 1) P. DDP sums once per step; FSDP2 gathers each block twice per
micro-batch, the rest once, and sums parts once per micro-batch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from record import machine, versions, write_result
from volume.blocks import BLOCKS, CLASSES, WIDTH

RECIPE = Path(__file__).resolve().parent / "volume" / "blocks.py"
SHARDLAUNCH = str(Path(sys.executable).parent / "shardlaunch")
IN_BLOCKS = BLOCKS * 2 * (WIDTH + 1) * WIDTH
OUTSIDE = (WIDTH + 1) * CLASSES
MICRO_BATCH = 4
SHORT, LONG = 5, 25  # steps


def main(argv: Sequence[str] | None = None) -> None:
    """Count all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    rows = []
    for strategy in ("ddp", "fsdp2"):
        for ranks in arguments.ranks:
            for micro_batches in (1, 2):
                short, long = (_sent(strategy, ranks, micro_batches, steps) for steps in (SHORT, LONG))
                sent = (long - short) / (LONG - SHORT)
                theory = 4 * (ranks - 1) * _numbers(strategy, micro_batches)
                row = {"strategy": strategy, "ranks": ranks, "micro_batches": micro_batches}
                row |= {"mb": round(sent / 1e6, 2), "theory_mb": round(theory / 1e6, 2)}
                rows.append(row | {"ratio": round(sent / theory, 4)})
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.result:
        result = {"benchmark": "comm_volume", "rows": rows, "note": "", "machine": machine()}
        write_result(arguments.result, result | {"versions": versions("torch")})


def _numbers(strategy: str, micro_batches: int) -> int:
    """Return the numbers that N ranks must send per step, divided by N - 1."""
    if strategy == "ddp":
        return 2 * (IN_BLOCKS + OUTSIDE)
    return micro_batches * (3 * IN_BLOCKS + 2 * OUTSIDE)


def _sent(strategy: str, ranks: int, micro_batches: int, steps: int) -> int:
    """Return the bytes that a run sends through its loopback device."""
    batch = MICRO_BATCH * ranks * micro_batches
    with tempfile.TemporaryDirectory() as folder:
        options = ["--strategy", strategy, "--max-steps", str(steps), "--save-every", "0", "--tracker", "none"]
        options += ["--global-batch-size", str(batch), "--micro-batch-size", str(MICRO_BATCH), "--output-dir", folder]
        words = [SHARDLAUNCH, "run", str(RECIPE), "--ranks", str(ranks), "--", *options]
        inside = 'ip link set lo up && "$@" >&2; status=$?; cat /sys/class/net/lo/statistics/tx_bytes; exit $status'
        ended = subprocess.run(
            ["unshare", "--net", "--mount", "sh", "-c", f"mount -t sysfs sysfs /sys && {inside}", "sh", *words],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{ended.stderr[-3000:]}")
    return int(ended.stdout)


if __name__ == "__main__":
    main()

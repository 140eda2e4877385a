"""Loading a folder of Parquet files: block by block (load_shards), beside map-style (load_splits).

    python benchmarks/streaming.py --result streaming       # 300 MB of tokens, an epoch per arm and round

No model is trained: an arm makes the micro-batches of an epoch, shuffled, in a process of its own. Arms take turns.
Memory is that of the process and its workers (PSS of what is not of files), at its peak beyond what the process had
when the libraries were loaded; pages of mapped files, which the system may take back, are not counted. The map-style
arms start each time with an empty cache, into which they copy the data.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from record import machine, versions, write_result

TOKENS, FILES, ROW_GROUP = 512, 8, 2048
ARMS = {
    "map-style, `load_splits`": ("map", 0),
    "map-style, 2 workers": ("map", 2),
    "block by block, `load_shards`": ("blocks", 0),
    "block by block, 2 workers": ("blocks", 2),
}
SAMPLED_EVERY_S = 0.05


def main() -> None:
    """Measure all arms, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--note", default="", help="what else went on, to be kept with the figures")
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if args.arm:
        print(json.dumps(_measured(args.arm[0], args.arm[1], int(args.arm[2]))))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        num_bytes, num_samples = _write(Path(folder) / "data", args.megabytes << 20)
        for _ in range(args.rounds):
            for name, (kind, workers) in ARMS.items():
                with tempfile.TemporaryDirectory() as home:
                    rounds[name].append(_run(Path(folder) / "data", kind, workers, home))
    rows = [
        {"arm": name, **{key: statistics.median(one[key] for one in found) for key in found[0]}}
        for name, found in rounds.items()
    ]
    result = {
        "benchmark": "streaming",
        "command": f"benchmarks/streaming.py --rounds {args.rounds} --megabytes {args.megabytes} --result streaming",
        "note": args.note,
        "machine": machine(),
        "versions": versions("torch", "datasets", "pyarrow", "numpy"),
        "data": {"bytes": num_bytes, "samples": num_samples, "samples_per_block": ROW_GROUP},
        "rows": rows,
    }
    print(table([result]))
    if args.result:
        write_result(args.result, result)


def _write(folder: Path, num_bytes: int) -> tuple[int, int]:
    """Write rows of random tokens; return the bytes of the files and the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rng = np.random.default_rng(0)
    per_file = max(ROW_GROUP, num_bytes // (2 * TOKENS * FILES))
    for number in range(FILES):
        tokens = rng.integers(0, 1 << 16, per_file * TOKENS, dtype=np.uint16)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(tokens), TOKENS).cast(pa.list_(pa.uint16()))
        path = folder / f"train-{number}.parquet"
        pq.write_table(pa.table({"tokens": lists}), path, row_group_size=ROW_GROUP, use_dictionary=False)
    return sum(path.stat().st_size for path in folder.iterdir()), per_file * FILES


def _run(data: Path, kind: str, workers: int, home: str) -> dict[str, float]:
    environ = {**os.environ, "HF_HOME": home, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--arm", str(data), kind, str(workers)]
    output = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    found["cache_bytes"] = sum(path.stat().st_size for path in Path(home).rglob("*") if path.is_file())
    return found


def _measured(data: str, kind: str, workers: int) -> dict[str, float]:
    """Make the batches of an epoch; return times and memory."""
    import datasets  # noqa: F401  # before memory is looked at
    import pyarrow.parquet  # noqa: F401
    import torch

    from shardlaunch import Options, Recipe
    from shardlaunch.data import load_shards, load_splits
    from shardlaunch.launcher.runs.data import RunData
    from shardlaunch.launcher.runs.data import _training_plan as training_plan
    from shardlaunch.sharding.world import World

    class Loaded(Recipe):
        options: Options

        def collate(self, samples: Any, seeds: Any) -> Any:
            return {"labels": torch.from_numpy(np.stack([row["tokens"] for row in samples]).astype(np.int64))}

    recipe = Loaded(Options(num_workers=workers, micro_batch_size=32, global_batch_size=256))
    begun = time.perf_counter()
    with _Peak() as peak:
        if kind == "map":
            train = load_splits(f"{data}/*.parquet", seed=0, columns={"tokens": "any"})["train"].with_format("numpy")
        else:
            train = load_shards(f"{data}/*.parquet", columns=["tokens"])["train"]
        plan = training_plan(recipe, train)
        num_steps = plan.steps_per_epoch
        run = RunData(splits={"train": train}, plan=plan, num_steps=num_steps, last_step=num_steps)
        batches = run.training_batches(recipe, World()).steps(0, num_steps)
        next(batches)
        started, cpu_s = time.perf_counter(), time.process_time()
        num_samples = sum(batch.num_samples for batch in batches)
        elapsed_s = time.perf_counter() - started
        cpu_s = time.process_time() - cpu_s
    del batches  # which waits for its workers
    of_workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "start_s": started - begun,
        "samples_per_s": num_samples / elapsed_s,
        "cpu_us_per_sample": 1e6 * (cpu_s + of_workers.ru_utime + of_workers.ru_stime) / num_samples,
        "peak_bytes": peak.most - peak.before,
    }


class _Peak:
    """The most memory that this process and its workers have to themselves while it is open."""

    def __enter__(self) -> "_Peak":
        self.before = self.most = self._now()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(SAMPLED_EVERY_S):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        process = psutil.Process()
        return sum(_own_bytes(one.pid) for one in (process, *process.children()))


def _own_bytes(pid: int) -> int:
    """Return a process's memory that is not of files; what it shares with forked ones, divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the table for the docs: speeds as ratios, because the arms met the same noise."""
    titles = "| | samples/s, ratio | CPU time per sample | memory, peak | copied into the cache | first batch after |"
    lines = [titles, "| --- " * 6 + "|"]
    for result in results:
        first = result["rows"][0]
        for row in result["rows"]:
            cells = (
                f"{row['samples_per_s'] / first['samples_per_s']:.2f}",
                f"{row['cpu_us_per_sample']:.0f} µs",
                f"{row['peak_bytes'] / 1e6:,.0f} MB",
                f"{row['cache_bytes'] / 1e6:,.0f} MB",
                f"{row['start_s']:.1f} s",
            )
            lines.append(f"| {' | '.join((row['arm'], *cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""LoRA beside full fine-tuning: quality, time of a step and bytes of a checkpoint, on the demo's film reviews.

    python benchmarks/lora_beside_full.py --result lora_beside_full

The 6-layer BERT of the demo (`bert_imdb --preset demo`: 353 steps of 32 reviews, one epoch, evaluated on films that it
has not seen). The arms train at the same time, each on one rank with one thread, so that what else the machine does
meets all alike. The learning rates were chosen beforehand: the demo's own, and ten times that for adapters.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import machine, versions, write_result

ARMS = {
    "full fine-tuning": (),
    "LoRA, rank 16": ("--lora-rank", "16", "--lr", "1e-3"),
}
COMMON = ("--preset", "demo", "--tracker", "none", "--log-every", "1", "--threads-per-rank", "1", "--keep", "1")


def main(argv: Sequence[str] | None = None) -> None:
    """Train all arms at once and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="of each arm (0: one epoch)")
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    parser.add_argument("--note", default="", help="what else is to be known, such as work beside the runs")
    arguments = parser.parse_args(argv)
    words = (*COMMON, *(("--max-steps", str(arguments.steps)) if arguments.steps else ()))
    with tempfile.TemporaryDirectory() as name:
        folders = {arm: Path(name) / str(number) for number, arm in enumerate(ARMS)}
        recipe = [sys.executable, "-m", "shardlaunch.recipes.bert_imdb", *words]
        on_cpu = os.environ | {"ACCELERATE_USE_CPU": "true"}
        runs = [
            subprocess.Popen([*recipe, *ARMS[arm], "--output-dir", str(it)], env=on_cpu, stdout=subprocess.DEVNULL)
            for arm, it in folders.items()
        ]
        statuses = [run.wait() for run in runs]
        if any(statuses):
            sys.exit("an arm has failed")
        rows = [{"arm": arm, "options": " ".join(ARMS[arm]), **measured(folder)} for arm, folder in folders.items()]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.result:
        result = {"benchmark": "lora_beside_full", "rows": rows, "note": arguments.note}
        write_result(
            arguments.result, {**result, "machine": machine(), "versions": versions("torch", "transformers", "peft")}
        )


def measured(folder: Path) -> dict[str, Any]:
    """Return what a run reached and took: its last evaluation, the median step, the bytes of its newest checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/accuracy" in line][-1]
    step_dir = max((folder / "checkpoints").iterdir())
    weights = [*step_dir.glob("model-*.safetensors"), *step_dir.glob("adapter_model.safetensors")]
    return {
        "steps": last["step"],
        "accuracy": round(last["eval/accuracy"], 4),
        "loss": round(last["eval/loss"], 4),
        "step_ms": round(1000 * statistics.median(line["step_s"] for line in lines if "step_s" in line), 1),
        "checkpoint_bytes": sum(file.stat().st_size for file in step_dir.iterdir()),
        "weights_bytes": sum(file.stat().st_size for file in weights),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the table for the docs. Times are ratios: the arms met the same noise."""
    lines = ["| | accuracy | loss | time of a step | checkpoint | weights in it |", "| --- " * 6 + "|"]
    for result in results:
        first = result["rows"][0]
        for row in result["rows"]:
            options = f" (`{row['options']}`)" if row["options"] else ""
            ratio = row["step_ms"] / first["step_ms"]
            sizes = (f"{row[key] / 1e6:.1f} MB" for key in ("checkpoint_bytes", "weights_bytes"))
            cells = (f"{100 * row['accuracy']:.1f} %", f"{row['loss']:.3f}", f"{ratio:.2f}", *sizes)
            lines.append(f"| {' | '.join((row['arm'] + options, *cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Summarize a run in one JSON file: python benchmarks/summarise_run.py OUTPUT_DIR NAME [--note TEXT].

It writes benchmarks/results/NAME.json: options that affect the results, versions, machine, evaluations, times.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SKIPPED = (
    "output_dir",
    "data",
    "config",
    "resume",
    "stop_at_step",
    "save_every",
    "keep",
    "tracker",
    "precision",
    "threads_per_rank",
)


def main() -> None:
    """Read run.json and metrics.jsonl of a run and write a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("name", help="name of the file in benchmarks/results")
    parser.add_argument("--note", default="", help="anything else to know, such as other load on the machine")
    words = parser.parse_args()
    record = json.loads((words.output_dir / "run.json").read_text())
    lines = [json.loads(line) for line in (words.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_s" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    summary = {
        "recipe": record["identity"]["recipe"],
        "options": {
            name: _portable(option["value"])
            for name, option in record["options"].items()
            if name not in SKIPPED and option["mark"] != "free"
        },
        "ranks": record["ranks"],
        "strategy": record["strategy"],
        "threads_per_rank": record["warn"]["--threads-per-rank"],
        "precision": record["warn"]["--precision"],
        "versions": record["versions"],
        "machine": {**record["machine"], "cpu": _cpu(), "system": platform.system()},
        "num_steps": steps[-1]["step"],
        "training_s": round(sum(line["step_s"] for line in steps), 1),
        "last_train_loss": steps[-1]["loss"],
        "evaluations": [{key: _short(value) for key, value in line.items()} for line in evaluations],
        "note": words.note,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{words.name}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{path.relative_to(RESULTS.parents[1])}: {_numbers(evaluations[-1])}, {summary['training_s']:.0f} s of steps"
    )


def _portable(value: Any) -> Any:
    """Return an option's value without local folders."""
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _numbers(line: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float))


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return f"{len(names)} cores of {names[0].partition(':')[2].strip()}" if names else platform.processor()


if __name__ == "__main__":
    main()

"""Summarise a run in one JSON file, from which benchmarks/tables.py makes the tables of docs/results.md.

    python benchmarks/summarise_run.py OUTPUT_DIR NAME --what TEXT --command TEXT --headline METRIC ...

It writes benchmarks/results/NAME.json: what was trained, identity and rounding options, versions, machine,
evaluations, times.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from record import RESULTS, machine, write_result

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
    """Read run.json and metrics.jsonl of a run and write its summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("name", help="of the file in benchmarks/results")
    parser.add_argument("--what", required=True, help="what was trained, on which data, for the table")
    parser.add_argument(
        "--command", required=True, help="the command that reproduces it; D stands for the data's folder"
    )
    parser.add_argument("--headline", nargs="+", default=["accuracy"], help="metrics of the last evaluation to show")
    parser.add_argument("--after", default="", help="name of the result whose weights the run starts from")
    parser.add_argument("--note", default="", help="what else is to be known, such as work beside the run")
    words = parser.parse_args()
    record = json.loads((words.output_dir / "run.json").read_text())
    lines = [json.loads(line) for line in (words.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_s" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    summary = {
        "what": words.what,
        "command": words.command,
        "headline": words.headline,
        **({"after": words.after} if words.after else {}),
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
        "machine": {**machine(), **record["machine"]},
        "num_steps": steps[-1]["step"],
        "training_s": round(sum(line["step_s"] for line in steps), 1),
        "last_train_loss": steps[-1]["loss"],
        "evaluations": [{key: _short(value) for key, value in line.items()} for line in evaluations],
        "note": words.note,
    }
    path = write_result(words.name, summary)
    print(
        f"{path.relative_to(RESULTS.parents[1])}: {_numbers(evaluations[-1])}, {summary['training_s']:.0f} s of steps"
    )


def _portable(value: Any) -> Any:
    """Return an option's value without the folders of the machine that it was used on."""
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _numbers(line: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float))


if __name__ == "__main__":
    main()

"""Whether --exact trains as well: curves with and without it beside the noise of seeds, on three real data sets.

    SHARDLAUNCH_DATA=D python benchmarks/exact_curves.py --result exact_curves

MNIST (one epoch of the recipe), tinyshakespeare by characters (the preset's model, 200 steps), IMDB (the demo's
pretrained BERT, 60 steps, evaluated on 2,084 reviews), each with 4 seeds, on one rank with one thread. Loss is the mean
of the last 20 training steps; "noise" is the standard deviation over seeds without --exact, "difference" the largest
over seeds between the runs of a seed with and without.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import machine, versions, write_result

from shardlaunch import start

SEEDS = (0, 1, 2, 3)
LAST_STEPS = 20
COMMON = {"tracker": "none", "save_every": 0, "log_every": 1, "threads_per_rank": 1, "precision": "fp32"}
TASKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "MNIST": ("mnist_mlp", "mnist", "accuracy", {"epochs": 1}),
    "tinyshakespeare": (
        "gpt_lm",
        "tinyshakespeare/input.txt",
        "loss",
        {"preset": "characters", "max_steps": 200, "eval_every": 200},
    ),
    "IMDB": ("bert_imdb", "imdb", "accuracy", {"preset": "demo", "max_steps": 60}),
}
NUM_REVIEWS = 2000


def main(argv: Sequence[str] | None = None) -> None:
    """Train all tasks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    data = Path(os.environ["SHARDLAUNCH_DATA"])
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in arguments.tasks:
            rows.append(measured(task, data, folder))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.result:
        result = {
            "benchmark": "exact_curves",
            "seeds": len(SEEDS),
            "rows": rows,
            "note": "",
            "machine": machine(),
            "versions": versions("torch", "transformers"),
        }
        write_result(arguments.result, result)


def measured(task: str, data: Path, folder: Path) -> dict[str, Any]:
    """Train a task with all seeds, with and without --exact."""
    recipe, path, metric, options = TASKS[task]
    where = data / path
    if task == "IMDB":
        where = first_reviews(where, folder / "reviews")
    ends: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for seed in SEEDS:
        for is_exact in (False, True):
            run_dir = folder / f"{task}-{seed}-{is_exact}"
            result = start(
                recipe, ranks=1, data=str(where), seed=seed, exact=is_exact, output_dir=run_dir, **COMMON | options
            )
            loss = result.history()["loss"].dropna().tail(LAST_STEPS).mean()
            ends[is_exact].append((float(loss), result.evaluations[-1][metric]))
    row: dict[str, Any] = {"task": task, "metric": metric}
    for number, what in enumerate(("training_loss", metric if metric != "loss" else "evaluation_loss")):
        plain, exact = ([end[number] for end in ends[is_exact]] for is_exact in (False, True))
        row[what] = {
            "plain": round(statistics.mean(plain), 5),
            "exact": round(statistics.mean(exact), 5),
            "noise": round(statistics.stdev(plain), 5),
            "difference": round(max(abs(one - other) for one, other in zip(plain, exact, strict=True)), 6),
        }
    return row


def first_reviews(source: Path, target: Path) -> Path:
    """Return a folder with all training reviews and some of those for evaluation."""
    import pyarrow.parquet as pq

    target.mkdir()
    pq.write_table(pq.read_table(source / "train.parquet"), target / "train.parquet")
    test = pq.read_table(source / "test.parquet")  # all of one label come first
    pq.write_table(test.take(list(range(0, len(test), len(test) // NUM_REVIEWS))), target / "test.parquet")
    return target


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

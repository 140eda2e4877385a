"""How much of a step ranks wait for each other, by how the samples are divided among micro-batches.

    python benchmarks/equal_work.py --data FOLDER      # train.parquet with a column text

No training: the lengths in tokens of film reviews, and for each step the work of the rank that has the most, beside
what each rank would have if all samples were divided evenly and nothing padded. The work of a sample is a linear and a
quadratic part of the length that it is padded to, as `--equal-work` takes it. One micro-batch of 8 reviews, on average,
per rank and step, or four of 2. Arms: random order, the sampler of the transformers Trainer that groups by length, and
this project's order without and with `--equal-work`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine, versions, write_result
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

from shardlaunch import demo
from shardlaunch.launcher.training.batch_plan import BatchPlan
from shardlaunch.launcher.training.equal_work import shares, work_of


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the reviews")
    parser.add_argument("--reviews", type=int, default=6400)
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    whole = _lengths(arguments.data, arguments.reviews)
    rows = []
    for most in (128, 256, 512):
        for ranks, micro_batch_size in ((2, 8), (4, 8), (8, 8), (2, 2)):
            rows.append(_row(np.minimum(whole, most), most, ranks, micro_batch_size))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.result:
        result = {
            "benchmark": "equal_work",
            "reviews": arguments.reviews,
            "rows": rows,
            "note": "",
            "machine": machine(),
            "versions": versions("torch", "transformers"),
        }
        write_result(arguments.result, result)


def _lengths(data: Path, count: int) -> np.ndarray:
    import datasets

    table = datasets.Dataset.from_parquet(str(data / "train.parquet"))
    texts = table.select(np.random.default_rng(0).permutation(len(table))[:count])["text"][:]
    tokenizer = AutoTokenizer.from_pretrained(demo.bert_dir())
    return np.array([len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]])


def _row(lengths: np.ndarray, most: int, ranks: int, micro_batch_size: int) -> dict[str, Any]:
    size = ranks * 8 if micro_batch_size == 8 else 16
    plan = BatchPlan(
        num_samples=len(lengths), global_batch_size=size, micro_batch_size=micro_batch_size, seed=0, lengths=lengths
    )
    arms: dict[str, Callable[[], float]] = {
        "random": lambda: _in_turn(np.random.default_rng(0).permutation(len(lengths)), lengths, ranks, size),
        "Trainer, grouped by length": lambda: _in_turn(
            np.array(get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(0))),
            lengths,
            ranks,
            size,
        ),
        "shardlaunch": partial(_planned, plan, ranks),
        "shardlaunch, --equal-work": partial(_planned, replace(plan, equal_work=True), ranks),
    }
    found = {arm: round(measured(), 2) for arm, measured in arms.items()}
    return {"tokens": most, "ranks": ranks, "micro_batches": size // micro_batch_size, "work": found}


def _planned(plan: BatchPlan, ranks: int) -> float:
    assert plan.lengths is not None
    slowest = 0.0
    for step in range(plan.steps_per_epoch):
        work = plan.work(step)
        slowest += max(sum(work[index] for index in of_rank) for of_rank in shares(work, ranks))
    return float(slowest / (work_of(plan.lengths).sum() / ranks))


def _in_turn(order: np.ndarray, lengths: np.ndarray, ranks: int, size: int) -> float:
    """Return the same where each rank has one micro-batch per step: the next samples of an order."""
    bounds = [*range(0, len(order) - len(order) % size + 1, size // ranks)]
    padded = [(end - begin) * work_of(lengths[order[begin:end]].max()) for begin, end in pairwise(bounds)]
    slowest = np.array(padded).reshape(-1, ranks).max(axis=1).sum()
    return float(slowest / (work_of(lengths[order[: bounds[-1]]]).sum() / ranks))


if __name__ == "__main__":
    main()

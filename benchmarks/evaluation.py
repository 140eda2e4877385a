"""How many reviews an evaluation does per second, beside the transformers Trainer and a loop by hand.

    python benchmarks/evaluation.py --data FOLDER       # train.parquet and test.parquet with columns text and label

A BERT of 6 layers, 384 wide, says of film reviews whether they are good: loss and accuracy on reviews of up to 128 and
512 tokens, 32 per forward pass, tokenized before, on one thread. Arms: `shardlaunch`, whose evaluations take reviews in
the order of their length; the Trainer, with its default order and grouped by length (whose order of an evaluation is
one, too); a loop over a DataLoader in the order of the data. They take turns, in another order each round; ratios are
medians of those within a round. All must come to the same accuracy.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import machine, spread, versions, write_result
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from shardlaunch import demo
from shardlaunch.launcher.command_line.parsing import options_from_keywords
from shardlaunch.launcher.runs.data import load_data
from shardlaunch.launcher.runs.session import silent_libraries
from shardlaunch.launcher.training.evaluation import Evaluator
from shardlaunch.recipes.bert_imdb import BertImdb, BertOptions
from shardlaunch.sharding.precision import apply_precision
from shardlaunch.sharding.world import World

OURS, TRAINER, GROUPED, LOOP = "shardlaunch", "Trainer", "Trainer, grouped by length", "loop by hand"
PER_PASS = 32
Arm = Callable[[], float]
"""Evaluates, and returns the accuracy."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the reviews")
    parser.add_argument("--reviews", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder, silent_libraries():
        _draw(arguments.data, Path(folder, "data"), arguments.reviews)
        for length in arguments.lengths:
            rows += _rows(_arms(Path(folder, "data"), length), length, arguments)
    if arguments.result:
        result = {
            "benchmark": "evaluation",
            **{name: getattr(arguments, name) for name in ("rounds", "reviews")},
            "rows": rows,
            "note": "",
            "machine": machine(),
            "versions": versions("torch", "transformers"),
        }
        write_result(arguments.result, result)


def _draw(data: Path, folder: Path, count: int) -> None:
    """Write some of the reviews, as a table that the recipe reads too."""
    import datasets

    for split in ("train", "test"):
        table = datasets.Dataset.from_parquet(str(data / f"{split}.parquet"), cache_dir=str(folder.with_name("cache")))
        rows = random.Random(0).sample(range(len(table)), count)
        table.select(rows).select_columns(["text", "label"]).to_parquet(str(folder / f"{split}.parquet"))


def _arms(folder: Path, length: int) -> dict[str, Arm]:
    given = {"data": str(folder), "max_length": length, "eval_micro_batch_size": PER_PASS}
    options = options_from_keywords(BertOptions, BertImdb.presets, {"preset": "demo", **given})
    recipe, world = BertImdb(options), World()
    with redirect_stdout(StringIO()):
        data = load_data(recipe, world, None)
    torch.manual_seed(0)
    model = recipe.model().eval()
    batches = data.evaluation_batches(recipe, world)
    assert batches is not None
    evaluator = Evaluator(recipe, batches, world=world, precision=apply_precision("fp32", world.device))

    def ours() -> float:
        found = evaluator.evaluate(model, lambda done, of: None, lambda: None)["accuracy"]
        assert isinstance(found, float)
        return found

    tokenizer = AutoTokenizer.from_pretrained(demo.bert_dir())
    collate = DataCollatorWithPadding(tokenizer)
    rows = _tokenized(folder, tokenizer, length)

    def trainer(strategy: str) -> Arm:
        given = TrainingArguments(
            output_dir=str(folder.with_name("trainer")),
            per_device_eval_batch_size=PER_PASS,
            train_sampling_strategy=strategy,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        made = Trainer(
            model,
            given,
            eval_dataset=rows,
            data_collator=collate,
            compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
        )

        def evaluate() -> float:
            with redirect_stdout(StringIO()):
                return float(made.evaluate()["eval_accuracy"])

        return evaluate

    @torch.no_grad()
    def loop() -> float:
        model.eval()
        right = loss = 0.0
        for batch in DataLoader(rows, PER_PASS, collate_fn=collate):
            outputs = model(**batch)
            right += float((outputs.logits.argmax(-1) == batch["labels"]).sum())
            loss += float(outputs.loss) * len(batch["labels"])
        return right / len(rows)

    return {OURS: ours, TRAINER: trainer("random"), GROUPED: trainer("group_by_length"), LOOP: loop}


def _tokenized(folder: Path, tokenizer: Any, length: int) -> Any:
    import datasets

    table = datasets.Dataset.from_parquet(str(folder / "test.parquet"), cache_dir=str(folder.with_name("cache")))
    tokens = table.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=length), batched=True)
    return tokens.remove_columns(["text"]).rename_column("label", "labels")


def _rows(arms: dict[str, Arm], length: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    accuracies = set()
    for number in range(arguments.rounds + 1):  # the first one warms up
        for arm in random.Random(number).sample(list(arms), len(arms)):
            begun = time.perf_counter()
            accuracies.add(round(arms[arm](), 6))
            if number:
                seconds[arm].append(time.perf_counter() - begun)
    if len(accuracies) > 1:
        raise SystemExit(f"the arms come to different accuracies: {sorted(accuracies)}")
    rows = []
    for arm, its in seconds.items():
        per_s = [arguments.reviews / each for each in its]
        ratios = [each / ours for each, ours in zip(its, seconds[OURS], strict=True)]
        rows.append({"length": length, "arm": arm, "reviews_per_s": spread(per_s, 1), "times_ours": spread(ratios, 2)})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


if __name__ == "__main__":
    main()

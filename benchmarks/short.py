"""A short form of the benchmarks of speed, and one table of what they find: `make bench`, about 15 minutes.

    python benchmarks/short.py [NAME ...]

Few rounds and small sizes: a first look, and whether all still run. The figures of docs/benchmarks.md are of the
benchmarks themselves, with their defaults. What needs data sets takes them from the folder that SHARDLAUNCH_DATA names,
else it is left out, which is said.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import machine, markdown_table, versions

HERE = Path(__file__).resolve().parent
DATA = os.environ.get("SHARDLAUNCH_DATA", "")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
Figures = Iterator[tuple[str, float, str]]


@dataclass(frozen=True, kw_only=True)
class Short:
    """A short form: the words of its command, and what to show of its result: names, figures, goals."""

    words: tuple[str, ...] = ()
    ranks: int = 1
    figures: Callable[[Any], Figures]
    data: str = ""
    """The path below SHARDLAUNCH_DATA that it needs."""


def _of_rows(*wanted: tuple[str, str], key: str = "x_raw") -> Callable[[Any], Figures]:
    def figures(result: Any) -> Figures:
        for row in result["rows"]:
            for name, goal in wanted:
                if row["name"] == name:
                    yield name, row[key], goal

    return figures


def _attention(result: Any) -> Figures:
    for row in result["rows"]:
        yield f"plain / ours, {row['length']} tokens", row["gain"][0], ""


def _comm_volume(result: Any) -> Figures:
    for row in result["rows"]:
        yield f"sent / theory, {row['strategy']}", row["ratio"], "1.02"


def _equal_work(result: Any) -> Figures:
    row = result["rows"][-1]
    for arm, work in row["work"].items():
        yield f"work of the slowest of {row['ranks']} ranks, {row['tokens']} tokens: {arm}", work, ""


def _evaluation(result: Any) -> Figures:
    for row in result["rows"]:
        yield f"evaluation, x ours: {row['arm']}, {row['length']} tokens", row["times_ours"][0], ""


def _exact_cost(result: Any) -> Figures:
    for arm in result["arms"]:
        if "exact" in arm["arm"]:
            yield f"step, {arm['arm']} / plain", arm["over_plain"][0], "1.15"


def _head_loss(result: Any) -> Figures:
    yield "memory / all logits", result["rows"][-1]["memory"][0], "0.25"
    yield "CPU time / all logits", result["rows"][-1]["time"][0], ""


def _lm(result: Any) -> Figures:
    for row in result["rows"]:
        yield f"tokens/s over a loop by hand: {row['arm']}", row["over_loop"][0], ""


def _startup(result: Any) -> Figures:
    for row in result["rows"]:
        if "Trainer" not in row["arm"]:
            yield f"first step, x Trainer: {row['arm']}", row["first_step_over_trainer"][0], "0.7"


def _streaming(result: Any) -> Figures:
    for row in result["rows"]:
        yield f"samples/s: {row['arm']}", round(row["samples_per_s"]), ""


def _times(result: Any) -> Figures:
    goals = {"Trainer, grouped by length": "at least 1.25", "Trainer": "at least 3"}
    for row in result["rows"]:
        yield f"training, x ours: {row['arm']}, {row['length']} tokens", row["times_ours"][0], goals.get(row["arm"], "")


SHORT = {
    "attention": Short(words=("--rounds", "1", "--lengths", "256", "512"), figures=_attention),
    "checkpoint_io": Short(
        words=("--gigabytes", "0.5", "--rounds", "3", "--written-by"),
        ranks=2,
        figures=_of_rows(
            ("save: ours", "1.10"), ("save: accelerate", ""), ("load: ours", "1.2"), ("load: accelerate", "")
        ),
    ),
    "checkpoint_stall": Short(
        words=("--gigabytes", "0.5", "--rounds", "3"),
        ranks=2,
        figures=_of_rows(("stall: ours, beside the training", "1.05"), ("stall: accelerate", "")),
    ),
    "comm_volume": Short(words=("--ranks", "2"), figures=_comm_volume),
    "equal_work": Short(words=("--reviews", "1600", "--data", "{data}"), figures=_equal_work, data="imdb"),
    "evaluation": Short(
        words=("--rounds", "2", "--reviews", "64", "--lengths", "512", "--data", "{data}"),
        figures=_evaluation,
        data="imdb",
    ),
    "exact_cost": Short(words=("--rounds", "2", "--steps", "1"), ranks=2, figures=_exact_cost),
    "head_loss": Short(words=("--rounds", "2", "--sizes", "1"), figures=_head_loss),
    "lm_tokens_per_s": Short(
        words=("--rounds", "1", "--data", "{data}"), figures=_lm, data="tinyshakespeare/input.txt"
    ),
    "startup": Short(words=("--rounds", "2"), figures=_startup),
    "step_overhead": Short(
        words=("--rounds", "3"),
        ranks=2,
        figures=_of_rows(("ours, hooks do nothing: over DDP", "50"), key="median"),
    ),
    "streaming": Short(words=("--rounds", "1", "--megabytes", "50"), figures=_streaming),
    "time_to_accuracy": Short(
        words=(
            *("--rounds", "1", "--lengths", "512", "--reviews", "96", "--test-reviews", "32"),
            *("--data", "{data}"),
        ),
        figures=_times,
        data="imdb",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run short forms one after the other, print a table, and return the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHORT)} (default: all)")
    names = parser.parse_args(argv).names or list(SHORT)
    if unknown := [name for name in names if name not in SHORT]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(SHORT)}")
    rows: list[list[str]] = []
    failed = []
    for name in names:
        begun = time.monotonic()
        result = _result(name, SHORT[name])
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        if result is None:
            failed.append(name)
        elif result:
            rows += [[name, what, f"{figure:g}", goal] for what, figure, goal in SHORT[name].figures(result)]
    print(markdown_table(["benchmark", "what", "figure", "goal"], rows))
    print(json.dumps({**machine(), **versions("torch", "transformers", "accelerate")}))
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return len(failed)


def _result(name: str, short: Short) -> Mapping[str, Any] | None:
    """Return the result of a short form, {} where its data is missing, None where it failed, which is said."""
    data = Path(DATA) / short.data
    if short.data and not (DATA and data.exists()):
        print(f"{name}: left out, since SHARDLAUNCH_DATA names no folder with {short.data}", file=sys.stderr)
        return {}
    launcher = TORCHRUN if short.ranks > 1 else ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        words = [sys.executable, *launcher, str(HERE / f"{name}.py"), *short.words, "--result", str(path)]
        words = [word.format(data=data) for word in words]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(words, env=env, capture_output=True, text=True)
        if ended.returncode:
            print(f"{name}: status {ended.returncode}\n{ended.stderr[-2000:]}", file=sys.stderr)
            return None
        result: Mapping[str, Any] = json.loads(next(Path(folder).glob("*.json")).read_text())
        return result


if __name__ == "__main__":
    raise SystemExit(main())

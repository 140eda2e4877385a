"""Train the recipes' demos under --exact on other ranks and strategies: python -m tests.faults.same_bits [--part K/N].

Each demo's first 50 steps and an evaluation on one rank are what all others are compared with: lines of metrics,
position, tensors, to the bit. 7 micro-batches per step, which no number of ranks shares evenly, and 0 or 2 loading
workers. Then one run whose ranks are killed 20 times, and which goes on under another strategy on another number of
ranks each time. Prints a line for each; the exit status is 1 if a bit differs.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from shardlaunch.checkpoints.reader import checkpoint_steps
from shardlaunch.sharding.environment import JOIN_TIMEOUT_VARIABLE
from tests.faults.choosing import add_choice, chosen
from tests.golden.demos import RECIPES
from tests.launch.command import environment, forked, forked_end_of
from tests.recipes import bits

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
Topology = tuple[str, int]
ONE: Topology = ("single", 1)
TOPOLOGIES: tuple[Topology, ...] = (
    ("dp", 1),
    *(("ddp", num_ranks) for num_ranks in (2, 3, 4, 8)),
    *(("fsdp2", num_ranks) for num_ranks in (2, 3, 4)),
    ("hsdp", 4),
)
IN_LOW_PRECISION: tuple[Topology, ...] = (("ddp", 3), ("fsdp2", 2), ("hsdp", 4))
NUM_STEPS, MICRO_BATCHES, SAMPLES = 50, 7, 2
OPTIONS = (
    *("--preset", "demo", "--exact", "--tracker", "none", "--log-every", "1", "--hang-after-s", "120"),
    *("--global-batch-size", str(MICRO_BATCHES * SAMPLES), "--micro-batch-size", str(SAMPLES)),
    *("--eval-micro-batch-size", "32"),
)
CHAIN_STEPS_PER_KILL = 4


def _words(recipe: str, topology: Topology, run_dir: Path, options: Sequence[str]) -> list[str]:
    given = [*OPTIONS, *options, "--strategy", topology[0], "--output-dir", str(run_dir)]
    return [sys.executable, str(FOLDER / f"{recipe}.py"), *given]


def compare(
    recipe: str,
    precision: str,
    topologies: Sequence[Topology],
    *,
    num_steps: int = NUM_STEPS,
    say: Callable[[str], object] = print,
) -> int:
    """Run a demo's first steps on one rank and on others, and return how many of these differ."""
    num_bad = 0
    options = ("--stop-at-step", str(num_steps), "--eval-every", str(num_steps), "--save-every", "0")
    with tempfile.TemporaryDirectory() as folder:
        expected = None
        for number, (strategy, num_ranks) in enumerate((ONE, *topologies)):
            run_dir, began = Path(folder, str(number)), time.monotonic()
            its_options = (*options, "--precision", precision, "--num-workers", str(number % 2 * 2))
            words = _words(recipe, (strategy, num_ranks), run_dir, its_options)
            ended = forked_end_of(words, environment(Path(folder, "hf")), num_ranks=num_ranks)
            found = bits(run_dir) if ended.status == 0 else None
            expected = found if number == 0 else expected
            is_same = found is not None and found == expected
            num_bad += not is_same
            how = "the same bits" if is_same else f"BAD: {'other bits' if found else ended.both[-1000:]}"
            say(f"{recipe}, {precision}: {strategy} x {num_ranks}, {time.monotonic() - began:.0f} s: {how}")
    return num_bad


def chain(recipe: str, num_kills: int, *, seed: int = 0, say: Callable[[str], object] = print) -> int:
    """Kill a demo's ranks again and again, each time to go on with others; return 1 if it ends with other bits."""
    random_ = random.Random(seed)
    options = ("--stop-at-step", str(num_kills * CHAIN_STEPS_PER_KILL), "--eval-every", "10", "--save-every", "2")
    said = []
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder, "hf"), {JOIN_TIMEOUT_VARIABLE: "60"})
        whole, run_dir = Path(folder, "whole"), Path(folder, "run")
        ended = forked_end_of(_words(recipe, ONE, whole, options), env)
        assert ended.status == 0, ended.both
        for number in range(num_kills + 1):
            topology = random_.choice((ONE, *TOPOLOGIES))
            said.append(f"{topology[0]} x {topology[1]}")
            words = _words(recipe, topology, run_dir, options)
            if number == num_kills:
                ended = forked_end_of(words, env, num_ranks=topology[1])
                break
            with forked(words, env, num_ranks=topology[1]) as running:
                after = (number + 1) * CHAIN_STEPS_PER_KILL
                while _newest_step(run_dir) < after - 1 and any(rank.is_alive() for rank in running.ranks):
                    time.sleep(0.02)
                time.sleep(random_.random() * 0.3)
                for rank in running.ranks:
                    rank.kill()
        is_same = ended.status == 0 and bits(run_dir) == bits(whole)
        how = "the same bits" if is_same else f"BAD: {'other bits' if ended.status == 0 else ended.both[-1000:]}"
        say(f"{recipe}, killed {num_kills} times, on {', '.join(said)}: {how}")
    return not is_same


def _newest_step(run_dir: Path) -> int:
    checkpoints_dir = run_dir / "checkpoints"
    return max(checkpoint_steps(checkpoints_dir), default=0) if checkpoints_dir.exists() else 0


def main() -> None:
    """Run the campaign as a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_choice(parser, count=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[Callable[[], int]] = []
    for recipe in RECIPES:
        cells.append(lambda recipe=recipe: compare(recipe, "fp32", TOPOLOGIES))  # type: ignore[misc]
        for precision in ("bf16", "fp16"):
            cells.append(lambda recipe=recipe, p=precision: compare(recipe, p, IN_LOW_PRECISION))  # type: ignore[misc]
        cells.append(lambda recipe=recipe: chain(recipe, 20))  # type: ignore[misc]
    num_bad = sum(cell() for cell in chosen(cells, arguments.count, arguments.seed, arguments.part))
    print(f"{num_bad} bad")
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()

"""Interrupt one run again and again, each time otherwise: python -m tests.faults.chaos [--count N] [--seed S].

The run has two ranks and goes on after each fault until it has ended: killed ranks, signals, requests by files, and
damage to what it left. It must end with the same metrics, each step once, and the same bits as a run without faults.
Prints how often each fault came; the exit status is 1 if a start fails otherwise than it should, or the end differs.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from shardlaunch.checkpoints.reader import checkpoint_steps
from shardlaunch.errors import EXIT_STOPPED, EXIT_USER_ERROR
from shardlaunch.sharding.environment import JOIN_TIMEOUT_VARIABLE
from tests.launch.command import Forked, environment, forked, forked_end_of
from tests.recipes import final_tensors, training_lines

NUM_RANKS = 2
STRATEGIES = ("ddp", "fsdp2", "zero3")
SAVE_EVERY = 5
STEPS_PER_FAULT = 8
# Far from its end, a run is to be interrupted, so that a step takes a while.
RECIPE = """
import time
from dataclasses import dataclass
import torch
from torchmetrics.classification import MulticlassAccuracy
from shardlaunch import Options, Recipe, TensorData, launch, option

@dataclass(kw_only=True)
class SlowOptions(Options):
    global_batch_size: int = 8
    micro_batch_size: int = 2
    eval_every: int = option(7, mark="free")
    save_every: int = option(SAVE_EVERY, mark="free")
    keep: int = option(3, mark="free")
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Slow(Recipe):
    options: SlowOptions
    best_metric = "accuracy"

    def datasets(self):
        inputs = torch.rand(96, 4, generator=torch.Generator().manual_seed(0))
        data = TensorData(inputs=inputs, labels=(inputs.sum(1) > 2).long())
        return {"train": data, "eval": data}

    def model(self):
        return torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2)
        )

    def loss(self, outputs, batch):
        time.sleep(0 if self.moment.is_evaluation else 0.005)
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(2, average="micro")}

launch(Slow)
""".replace("SAVE_EVERY", str(SAVE_EVERY))


def kill_one(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Kill a rank."""
    random_.choice(run.ranks).kill()


def kill_all(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Kill all ranks, as a machine that goes down."""
    for rank in run.ranks:
        rank.kill()


def signal_one(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Send a signal to a rank."""
    _send(random_.choice(run.ranks).pid, random_.choice(("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")))


def signal_all(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Send a signal to all ranks."""
    name = random_.choice(("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"))
    for rank in run.ranks:
        _send(rank.pid, name)


def signal_and_kill(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Send a signal and kill what has not saved in time."""
    signal_all(run, run_dir, random_)
    time.sleep(random_.random() * 0.1)
    kill_all(run, run_dir, random_)


def pause(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Stop a rank for a moment, as a busy machine does, then kill another."""
    pid = random_.choice(run.ranks).pid
    _send(pid, "SIGSTOP")
    time.sleep(random_.random() * 0.3)
    _send(pid, "SIGCONT")
    kill_one(run, run_dir, random_)


def ask_to_stop(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Ask by a file."""
    if run_dir.exists():
        (run_dir / "stop").touch()


def ask_to_save(run: Forked, run_dir: Path, random_: random.Random) -> None:
    """Ask for a save by a file, and kill a rank during or after it."""
    if run_dir.exists():
        (run_dir / "save-now").touch()
    time.sleep(random_.random() * 1.5)
    kill_one(run, run_dir, random_)


def flip(run_dir: Path, random_: random.Random) -> None:
    """Flip a bit in a file of the newest checkpoint, where there is another one."""
    if newest := _newest(run_dir):
        path = random_.choice([path for path in newest.iterdir() if path.stat().st_size])
        data = bytearray(path.read_bytes())
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        path.write_bytes(data)


def lose_file(run_dir: Path, random_: random.Random) -> None:
    """Delete a file of the newest checkpoint, where there is another one."""
    if newest := _newest(run_dir):
        random_.choice(sorted(newest.iterdir())).unlink()


def leave_staging(run_dir: Path, random_: random.Random) -> None:
    """Leave what a crash in a save does."""
    checkpoints_dir = run_dir / "checkpoints"
    if steps := checkpoint_steps(checkpoints_dir) if checkpoints_dir.exists() else []:
        source = checkpoints_dir / f"step-{steps[-1]:08}"
        shutil.copytree(source, checkpoints_dir / f".staging-step-{steps[-1] + SAVE_EVERY:08}", dirs_exist_ok=True)


DURING = (kill_one, kill_all, signal_one, signal_all, signal_and_kill, pause, ask_to_stop, ask_to_save)
AFTER = (flip, lose_file, leave_staging)


def _send(pid: int | None, name: str) -> None:
    assert pid is not None
    with suppress(ProcessLookupError):
        os.kill(pid, signal.Signals[name])


def _newest(run_dir: Path) -> Path | None:
    checkpoints_dir = run_dir / "checkpoints"
    steps = checkpoint_steps(checkpoints_dir) if checkpoints_dir.exists() else []
    return checkpoints_dir / f"step-{steps[-1]:08}" if len(steps) > 1 else None


def run(count: int, seed: int, *, strategy: str, say: Callable[[str], object] = print) -> bool:
    """Run with `count` faults, compare with a run without any, and return whether all is well."""
    random_ = random.Random(f"{seed} {strategy}")
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe, run_dir, whole = Path(folder, "slow.py"), Path(folder, "run"), Path(folder, "whole")
        recipe.write_text(RECIPE)
        # A rank that was killed before it has met the others is not waited for as long as without this.
        env = environment(Path(folder, "hf"), {JOIN_TIMEOUT_VARIABLE: "10"})
        # Where no launcher ends the others of a killed rank, and they are not connected yet, the watchdog does.
        options = ["--strategy", strategy, "--max-steps", str(count * STEPS_PER_FAULT), "--hang-after-s", "60"]
        words = [sys.executable, str(recipe), *options, "--output-dir", str(run_dir)]
        plain = [sys.executable, str(recipe), *options, "--output-dir", str(whole)]
        ended = forked_end_of(plain, env, num_ranks=NUM_RANKS)
        assert ended.status == 0, ended.both
        for number in range(count):
            with forked(words, env, num_ranks=NUM_RANKS) as running:
                # Mostly while it trains, sometimes while it starts.
                time.sleep(random_.uniform(0.3, 1.2) if random_.random() < 0.2 else random_.uniform(1.2, 2.0))
                fault = random_.choice(DURING)
                fault(running, run_dir, random_)
                counts[fault.__name__] += 1
                try:
                    ended = running.end()
                except AssertionError as error:
                    say(f"after fault {number}, {fault.__name__}: {error}\n{running.out.read_text()}")
                    return False
            is_refused = ended.status == EXIT_USER_ERROR and "waited 10 s" not in ended.err
            if "Traceback" in ended.both or is_refused:
                say(f"after fault {number}, {fault.__name__}:\n{ended.both}")
                return False
            if ended.status not in (0, EXIT_STOPPED) and random_.random() < 0.5:
                damage = random_.choice(AFTER)
                damage(run_dir, random_)
                counts[damage.__name__] += 1
        ended = forked_end_of(words, env, num_ranks=NUM_RANKS)
        say(f"{strategy}: " + ", ".join(f"{name} {times}" for name, times in sorted(counts.items())))
        if ended.status:
            say(f"does not end\n{ended.both}")
            return False
        if training_lines(run_dir) != training_lines(whole):
            say("other metrics")
            return False
        tensors, expected = final_tensors(run_dir), final_tensors(whole)
        is_same = tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in tensors)
        hidden = [path.name for path in run_dir.rglob(".*") if path.name != ".lock"]
        if not is_same or hidden:
            say(f"other tensors, or left behind: {hidden}")
        return is_same and not hidden


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="faults, over all strategies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    each = -(-arguments.count // len(arguments.strategies))
    results = [run(each, arguments.seed, strategy=strategy) for strategy in arguments.strategies]
    sys.exit(not all(results))

"""The runs that `shardlaunch parity` compares: a recipe for some steps, each run in processes of its own."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.start import COMMAND
from shardlaunch.launcher.reporting.tracking import read_metrics
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name

EXIT_DIFFERENT = 1
_NEVER = "1000000000"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A strategy on a number of ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy}, {self.ranks} rank{'s' * (self.ranks > 1)}"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run has ended."""

    topology: Topology
    wall_s: float
    problem: str
    """Why it failed; empty: it has not."""
    warnings: tuple[str, ...]
    """What the run has warned of."""


def new_console() -> Console:
    """Return a console for lines of any length."""
    return Console(highlight=False, soft_wrap=True)


def numbers_of_ranks(text: str) -> list[int]:
    """Return the numbers in --ranks, each once. Raises UserError for other words."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--ranks {text}: must be a number, or several separated by commas, such as 2,3,4")
    return list(dict.fromkeys(map(int, words)))


def check_request(recipe_argv: Sequence[str], *, ranks: Sequence[int], steps: int, least_ranks: int) -> None:
    """Raise UserError for what cannot be compared."""
    if min(ranks) < least_ranks or steps < 1:
        least = f"{least_ranks} rank{'s' * (least_ranks > 1)}"
        raise UserError(f"--ranks {','.join(map(str, ranks))} --steps {steps}: must be at least {least} and 1 step")
    if any(word.split("=")[0] == "--folds" for word in recipe_argv):
        raise UserError("--folds: parity compares single runs; remove it")


def topologies(
    strategies: Sequence[str], ranks: Sequence[int], console: Console, *, must_be_exact: bool = False
) -> list[Topology]:
    """Return the strategies to run, on each number of ranks, and print which of them are left out and why.

    Raises UserError for a strategy that was asked for and is not there on any of the numbers.
    """
    for name in strategies:
        check_strategy_name(name, f"--strategies {name}")
    found = []
    for name in strategies or [name for name, strategy in STRATEGIES.items() if not strategy.for_one_process]:
        reasons = {count: _why_unavailable(name, count, must_be_exact=must_be_exact) for count in ranks}
        if strategies and all(reasons.values()):
            raise UserError(f"--strategies {name}: {next(iter(reasons.values()))}")
        for count, reason in reasons.items():
            if not reason:
                found.append(Topology(strategy=name, ranks=count))
            elif len(set(reasons.values())) > 1:
                console.print(escape(f"{name}, {count} ranks: skipped: {reason}"))
        if all(reasons.values()):
            console.print(escape(f"{name}: skipped: {next(iter(reasons.values()))}"))
    return found


def _why_unavailable(name: str, ranks: int, *, must_be_exact: bool) -> str:
    """Return why a strategy is not available here, or an empty string."""
    if STRATEGIES[name].for_one_process:
        return "it runs in one process"
    if must_be_exact and not STRATEGIES[name].can_be_exact:
        return "it sums by itself, not exactly"
    if ranks < STRATEGIES[name].least_ranks:
        return f"it needs at least {STRATEGIES[name].least_ranks} ranks"
    try:
        STRATEGIES[name].check_available()
    except UserError as error:
        return str(error)
    return ""


def run_for(
    recipe: Path,
    recipe_argv: Sequence[str],
    folder: Path,
    topology: Topology,
    steps: int,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run the recipe in separate processes."""
    argv = [*recipe_argv, "--stop-at-step", str(steps), "--output-dir", str(folder), "--tracker", "none"]
    argv += ["--save-to", ""]
    argv += ["--eval-every", _NEVER, "--save-every", "0", "--log-every", "1"]
    if not any(word.startswith("--threads-per-rank") for word in argv):
        argv += ["--threads-per-rank", "1"]  # the number of threads affects rounding
    words = ["run", str(recipe), "--ranks", str(topology.ranks), "--strategy", topology.strategy, "--", *argv]
    started = time.monotonic()
    ended = run_command(words, {**os.environ, **(environment or {})})
    problem = ""
    if ended.returncode:
        lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        problem = "\n".join(lines[-3:]).removeprefix("error: ") or f"exit status {ended.returncode}"
    warnings = tuple(line for line in ended.stdout.splitlines() if line.startswith("warning:"))
    return Ended(topology=topology, wall_s=time.monotonic() - started, problem=problem, warnings=warnings)


def run_command(words: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run the console command with some words until it ends."""
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, env=environment)


def losses_of(folder: Path) -> dict[int, float]:
    """Return the loss of each step of a run."""
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}

"""`shardlaunch parity`: run a few steps of a recipe under each available strategy and compare the results."""

import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardlaunch.checkpoints.layout import CHECKPOINTS, step_dir_name
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, open_checkpoint
from shardlaunch.checkpoints.state import MODEL
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.start import COMMAND
from shardlaunch.launcher.reporting.tracking import read_metrics
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name

EXIT_DIFFERENT = 1
_NEVER = "1000000000"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Differences between a strategy's run and the reference, or why it failed."""

    strategy: str
    ranks: int
    loss: float = 0.0
    loss_step: int = 0
    weight: float = 0.0
    weight_name: str = ""
    wall_s: float = 0.0
    problem: str = ""
    warnings: tuple[str, ...] = ()
    """What the run has warned of."""


def compare_strategies(
    recipe: Path,
    recipe_argv: Sequence[str],
    *,
    ranks: int,
    steps: int,
    strategies: Sequence[str],
    tolerance: float,
) -> int:
    """Run a recipe on one rank, then under each strategy on `ranks` ranks; print a table of differences.

    The run on one rank first checks that the recipe resumes exactly. Returns 1 when a run fails or a loss differs by
    more than `tolerance`, else 0. Raises UserError when the reference run fails.
    """
    if ranks < 2 or steps < 1:
        raise UserError(f"--ranks {ranks} --steps {steps}: must be at least 2 ranks and 1 step")
    if any(word.split("=")[0] == "--folds" for word in recipe_argv):
        raise UserError("--folds: parity compares single runs; remove it")
    console = Console(highlight=False, soft_wrap=True)
    for name in strategies:
        check_strategy_name(name, f"--strategies {name}")
    names = []
    for name in strategies or [name for name, strategy in STRATEGIES.items() if not strategy.for_one_process]:
        reason = _why_unavailable(name, ranks)
        if reason and strategies:
            raise UserError(f"--strategies {name}: {reason}")
        if reason:
            console.print(escape(f"{name}: skipped: {reason}"))
        else:
            names.append(name)
    with tempfile.TemporaryDirectory(prefix="shardlaunch-parity-") as folder:
        reference = Path(folder) / "single"
        outcome = _run(recipe, [*recipe_argv, "--check"], reference, "single", 1, steps)
        if outcome.problem:
            raise UserError(f"the reference run on one rank failed:\n{outcome.problem}")
        steps = max(_losses(reference))
        console.print(f"single, 1 rank: {steps} steps in {outcome.wall_s:.1f} s")
        for warning in outcome.warnings:
            console.print(escape(warning))
        outcomes = []
        for name in names:
            outcome = _run(recipe, recipe_argv, Path(folder) / name, name, ranks, steps)
            if not outcome.problem:
                outcome = _compare(outcome, reference, Path(folder) / name)
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
            result = outcome.problem or f"{steps} steps in {outcome.wall_s:.1f} s"
            console.print(escape(f"{name}, {ranks} ranks: {result}"))
            outcomes.append(outcome)
    console.print(_table(outcomes, steps))
    different = [o.strategy for o in outcomes if o.problem or not o.loss <= tolerance]
    if different:
        console.print(f"different or failed: {', '.join(different)} (--tolerance {tolerance:g})")
        return EXIT_DIFFERENT
    console.print(f"the same run under every strategy: no loss differs by more than {tolerance:g}")
    return 0


def _why_unavailable(name: str, ranks: int) -> str:
    """Return why a strategy is not available here, or an empty string."""
    if STRATEGIES[name].for_one_process:
        return "it runs in one process"
    if ranks < STRATEGIES[name].least_ranks:
        return f"it needs at least {STRATEGIES[name].least_ranks} ranks"
    try:
        STRATEGIES[name].check_available()
    except UserError as error:
        return str(error)
    return ""


def _run(recipe: Path, recipe_argv: Sequence[str], folder: Path, name: str, ranks: int, steps: int) -> Outcome:
    """Run the recipe in a separate process."""
    argv = [*recipe_argv, "--stop-at-step", str(steps), "--output-dir", str(folder), "--tracker", "none"]
    argv += ["--save-to", ""]
    argv += ["--eval-every", _NEVER, "--save-every", "0", "--log-every", "1"]
    if not any(word.startswith("--threads-per-rank") for word in argv):
        argv += ["--threads-per-rank", "1"]  # the number of threads affects rounding
    words = [*COMMAND, "run", str(recipe), "--ranks", str(ranks), "--strategy", name, "--", *argv]
    started = time.monotonic()
    ended = subprocess.run(words, capture_output=True, text=True)
    problem = ""
    if ended.returncode:
        lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        problem = "\n".join(lines[-3:]) or f"exit status {ended.returncode}"
    warnings = tuple(line for line in ended.stdout.splitlines() if line.startswith("warning:"))
    wall_s = time.monotonic() - started
    return Outcome(strategy=name, ranks=ranks, wall_s=wall_s, problem=problem, warnings=warnings)


def _compare(outcome: Outcome, reference: Path, folder: Path) -> Outcome:
    expected, found = _losses(reference), _losses(folder)
    loss, loss_step = max((abs(expected[step] - found[step]), step) for step in expected)
    differences = _weight_differences(_last_checkpoint(reference), _last_checkpoint(folder))
    weight, weight_name = max(differences, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    return replace(outcome, loss=loss, loss_step=loss_step, weight=weight, weight_name=weight_name)


def _losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def _last_checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / CHECKPOINTS / step_dir_name(max(_losses(folder))), peers=Peers())


def _weight_differences(one: Checkpoint, other: Checkpoint) -> Iterator[tuple[float, str]]:
    for spec in one.specs():
        if spec.section == MODEL and spec.num_elements:
            difference = one.read(spec, 0, spec.num_elements).double() - other.read(spec, 0, spec.num_elements).double()
            yield difference.abs().max().item(), spec.name


def _table(outcomes: Sequence[Outcome], steps: int) -> Table:
    table = Table(title=f"differences from one rank over {steps} steps", title_justify="left", title_style="bold")
    for column in ("strategy", "ranks", "max loss difference", "max weight difference at the end"):
        table.add_column(column)
    for outcome in outcomes:
        cells = ["failed", ""]
        if not outcome.problem:
            cells = [
                f"{outcome.loss:.1e} (step {outcome.loss_step})",
                f"{outcome.weight:.1e} ({outcome.weight_name})" if outcome.weight else "0",
            ]
        table.add_row(outcome.strategy, str(outcome.ranks), *map(escape, cells))
    return table

"""`shardlaunch parity`: run a few steps of a recipe under each available strategy and compare the results."""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from shardlaunch.checkpoints.layout import CHECKPOINTS, step_dir_name
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, open_checkpoint
from shardlaunch.checkpoints.state import MODEL
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.parity_runs import (
    EXIT_DIFFERENT,
    Topology,
    check_request,
    losses_of,
    new_console,
    run_for,
    topologies,
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Differences between a strategy's run and the reference, or why it failed."""

    topology: Topology
    loss: float = 0.0
    loss_step: int = 0
    weight: float = 0.0
    weight_name: str = ""
    problem: str = ""


def compare_strategies(
    recipe: Path,
    recipe_argv: Sequence[str],
    *,
    ranks: Sequence[int],
    steps: int,
    strategies: Sequence[str],
    tolerance: float,
) -> int:
    """Run a recipe on one rank, then under each strategy on each number of ranks; print a table of differences.

    The run on one rank first checks that the recipe resumes exactly. Returns 1 when a run fails or a loss differs by
    more than `tolerance`, else 0. Raises UserError when the reference run fails.
    """
    check_request(recipe_argv, ranks=ranks, steps=steps, least_ranks=2)
    console = new_console()
    wanted = topologies(strategies, ranks, console)
    with tempfile.TemporaryDirectory(prefix="shardlaunch-parity-") as parent:
        reference, folder = Path(parent) / "single", Path(parent) / "other"
        single = Topology(strategy="single", ranks=1)
        ended = run_for(recipe, [*recipe_argv, "--check"], reference, single, steps)
        if ended.problem:
            raise UserError(f"the reference run on one rank failed:\n{ended.problem}")
        steps = max(losses_of(reference))
        console.print(f"{single}: {steps} steps in {ended.wall_s:.1f} s")
        for warning in ended.warnings:
            console.print(escape(warning))
        outcomes = []
        for topology in wanted:
            ended = run_for(recipe, recipe_argv, folder, topology, steps)
            if ended.problem:
                outcomes.append(Outcome(topology=topology, problem=ended.problem))
            else:
                outcomes.append(_compare(topology, reference, folder))
            shutil.rmtree(folder, ignore_errors=True)
            console.print(escape(f"{topology}: {ended.problem or f'{steps} steps in {ended.wall_s:.1f} s'}"))
    console.print(_table(outcomes, steps))
    different = [str(o.topology) for o in outcomes if o.problem or not o.loss <= tolerance]
    if different:
        console.print(f"different or failed: {'; '.join(different)} (--tolerance {tolerance:g})")
        return EXIT_DIFFERENT
    console.print(f"the same run under every strategy: no loss differs by more than {tolerance:g}")
    return 0


def _compare(topology: Topology, reference: Path, folder: Path) -> Outcome:
    expected, found = losses_of(reference), losses_of(folder)
    loss, loss_step = max((abs(expected[step] - found[step]), step) for step in expected)
    differences = _weight_differences(_last_checkpoint(reference), _last_checkpoint(folder))
    weight, weight_name = max(differences, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    return Outcome(topology=topology, loss=loss, loss_step=loss_step, weight=weight, weight_name=weight_name)


def _last_checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / CHECKPOINTS / step_dir_name(max(losses_of(folder))), peers=Peers())


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
        table.add_row(outcome.topology.strategy, str(outcome.topology.ranks), *map(escape, cells))
    return table

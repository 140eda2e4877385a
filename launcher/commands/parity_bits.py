"""`shardlaunch parity --exact` and `--find`: compare runs to the bit, and name what differs first."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from shardlaunch.checkpoints.digests import crc64nvme
from shardlaunch.checkpoints.records import to_json
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.first_difference import Difference, first_difference, num_recorded
from shardlaunch.launcher.commands.parity_runs import (
    EXIT_DIFFERENT,
    Topology,
    check_request,
    new_console,
    run_for,
    topologies,
)
from shardlaunch.launcher.reporting.tracking import recorded_digests
from shardlaunch.launcher.training.recording import RECORD_VARIABLE
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name

_RECORDED = {RECORD_VARIABLE: "1"}


def compare_bits(
    recipe: Path, recipe_argv: Sequence[str], *, ranks: Sequence[int], steps: int, strategies: Sequence[str]
) -> int:
    """Run a recipe with --exact on one rank, then under each strategy on each number of ranks; print their digests.

    For each run that differs, prints what differs first. Returns 1 if one does, or fails, else 0. Raises UserError when
    the reference run fails.
    """
    check_request(recipe_argv, ranks=ranks, steps=steps, least_ranks=2)
    _refuse(recipe_argv, "--exact")
    console = new_console()
    wanted = topologies(strategies, ranks, console, must_be_exact=True)
    argv = [*recipe_argv, "--exact", "--digest-every", "1"]
    table = Table(title_justify="left", title_style="bold")
    for column in ("strategy", "ranks", "digest", ""):
        table.add_column(column)
    differing = []
    with tempfile.TemporaryDirectory(prefix="shardlaunch-parity-") as parent:
        reference, folder = Path(parent) / "single", Path(parent) / "other"
        single = Topology(strategy="single", ranks=1)
        ended = run_for(recipe, argv, reference, single, steps, _RECORDED)
        if ended.problem:
            raise UserError(f"the reference run on one rank failed:\n{ended.problem}")
        expected, (steps, _) = _digest_of_run(reference), num_recorded(reference)
        console.print(f"{single}: {steps} steps in {ended.wall_s:.1f} s")
        table.title = f"digests of losses, weights and optimizer over {steps} steps"
        table.add_row(single.strategy, "1", expected, "")
        for topology in wanted:
            ended = run_for(recipe, argv, folder, topology, steps, _RECORDED)
            digest = "" if ended.problem else _digest_of_run(folder)
            difference = None if ended.problem else first_difference(reference, folder)
            shutil.rmtree(folder, ignore_errors=True)
            console.print(escape(f"{topology}: {ended.problem or f'{steps} steps in {ended.wall_s:.1f} s'}"))
            result = "failed" if ended.problem else "the same bits" if digest == expected else "differs"
            if difference is not None or result != "the same bits":
                differing.append(str(topology))
                result = f"differs in step {difference.step}" if difference is not None else result
            if difference is not None:
                console.print(_explained(difference))
            table.add_row(topology.strategy, str(topology.ranks), digest, result)
    console.print(table)
    if differing:
        console.print(f"different or failed: {'; '.join(differing)}")
        return EXIT_DIFFERENT
    console.print("the same bits under every strategy, on any of these ranks")
    return 0


def find_difference(
    recipe: Path, recipe_argv: Sequence[str], *, ranks: Sequence[int], steps: int, strategies: Sequence[str]
) -> int:
    """Run a recipe twice in the same way, and print the first thing that differs: step, micro-batch, module.

    Returns 1 if something does, else 0. Raises UserError when a run fails.
    """
    check_request(recipe_argv, ranks=ranks, steps=steps, least_ranks=1)
    _refuse(recipe_argv, "--find")
    if len(ranks) > 1 or len(strategies) > 1:
        raise UserError("--find: both runs are the same; give one number of --ranks and one of --strategies")
    (count,) = ranks
    name = strategies[0] if strategies else "single" if count == 1 else "ddp"
    check_strategy_name(name, f"--strategies {name}")
    console = new_console()
    topology = Topology(strategy=name, ranks=count)
    if count > 1 or not STRATEGIES[name].for_one_process:
        (topology,) = topologies([name], ranks, console)
    with tempfile.TemporaryDirectory(prefix="shardlaunch-parity-") as parent:
        folders = [Path(parent) / "first", Path(parent) / "second"]
        for folder in folders:
            ended = run_for(recipe, recipe_argv, folder, topology, steps, _RECORDED)
            if ended.problem:
                raise UserError(f"the {folder.name} run failed ({topology}):\n{ended.problem}")
            console.print(f"{topology}, {folder.name} run: {ended.wall_s:.1f} s")
        steps, num_values = num_recorded(folders[0])
        difference = first_difference(*folders)
    if difference is None:
        console.print(f"two runs agree: {num_values:,} values of {steps} steps, in every module, to the bit")
        return 0
    console.print(_explained(difference))
    return EXIT_DIFFERENT


def _refuse(recipe_argv: Sequence[str], who: str) -> None:
    """Raise UserError for options of the recipe that would hide what is recorded, or contradict."""
    for word in recipe_argv:
        flag = word.split("=")[0]
        if flag == "--compile":
            raise UserError(f"{who}: not with --compile, which has no modules to look into; remove it")
        if flag == "--no-exact" and who == "--exact":
            raise UserError(f"{who}: contradicts {word}; remove one")


def _explained(difference: Difference) -> str:
    return escape(f"  differs first in {difference.describe()}\n  {difference.meaning}")


def _digest_of_run(folder: Path) -> str:
    """Return one digest of all losses and digests that a run has recorded."""
    return f"{crc64nvme(to_json(sorted(recorded_digests(folder).items()))):016x}"

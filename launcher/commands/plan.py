"""What a run would need under each strategy, before any GPU is taken: `shardlaunch plan`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from shardlaunch.checkpoints.files import error_text
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.doctor.recipe import load_command
from shardlaunch.launcher.planning.cluster import Cluster
from shardlaunch.launcher.planning.plans import (
    Subject,
    fastest,
    plan_strategy,
    suggest,
)
from shardlaunch.launcher.planning.report import assumptions, document, lines_of, table_of
from shardlaunch.launcher.recipe import Recipe, check_in_effect, has_own_step
from shardlaunch.launcher.runs.data import load_data
from shardlaunch.launcher.runs.session import preserved_process, silent_libraries
from shardlaunch.sharding.precision import resolve_precision
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name
from shardlaunch.sharding.world import World

EXIT_NOTHING_FITS = 1
LEAST_COLUMNS = 100  # of the table: a narrow terminal breaks its lines, which loses no number


def plan_run(path: Path, recipe_argv: Sequence[str], cluster: Cluster, *, strategy: str, as_json: bool) -> int:
    """Print what the run of a recipe would need, and return the exit status: 0 if something fits, else 1.

    Reads the data, and no weights; writes nothing but caches of data. Raises UserError for what the run would refuse
    under every strategy, and for a model that cannot be run on tensors without values.
    """
    with preserved_process(), silent_libraries():
        command, findings = load_command(path, recipe_argv)
        if command is None:
            raise UserError("; ".join(finding.text for finding in findings))
        names = _names(strategy, command.options.strategy, cluster.ranks)
        for flag, is_given in (
            ("--tensor-parallel", command.options.tensor_parallel > 1),
            ("--exact", command.options.exact),
        ):
            if is_given:
                raise UserError(f"{flag}: is not planned; remove it to plan the run without")
        recipe = command.recipe_type(command.options)
        check_in_effect(recipe)
        if has_own_step(type(recipe)) or type(recipe).references is not Recipe.references:
            raise UserError(
                "plan: not for a recipe with a step() or references() of its own, whose steps are not known beforehand"
            )
        say = _quiet if as_json else _say
        say("reading data")
        fold = 0 if command.options.folds else None
        try:
            data = load_data(recipe, World(), fold)
        except OSError as error:
            raise UserError(f"plan: the data cannot be read: {error_text(error)}") from error
        subject = Subject(
            recipe=recipe,
            data=data,
            precision_name=resolve_precision(command.options.precision, None),
        )
        micro_batch, batch = subject.largest_batch()
        plans = []
        for name in names:
            say(f"planning {name}")
            plans.append(plan_strategy(subject, cluster, name, micro_batch))
        if all(plan.memory is None for plan in plans):
            raise UserError("plan: " + "; ".join(f"{plan.strategy}: {plan.problem}" for plan in plans))
        best = fastest(plans)
        suggestion = suggest(subject, cluster, plans, say=say) if best is None else None
    if as_json:
        found = document(subject, cluster, plans, best, suggestion, recipe=command.name, batch=batch)
        print(json.dumps(found, indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True, width=max(LEAST_COLUMNS, Console().width))
        console.print(table_of(plans, cluster))
        for line in (*lines_of(subject, cluster, plans, best, suggestion), "", *assumptions(subject, cluster, batch)):
            console.print(escape(line))
    return 0 if best is not None else EXIT_NOTHING_FITS


def _names(strategy: str, option: str, ranks: int) -> Sequence[str]:
    """Return the strategies to plan. Raises UserError for unknown names, and for one that is for one process."""
    if strategy != "auto" and option not in ("auto", strategy):
        raise UserError(f"two strategies were requested: --strategy {strategy} and {option} of the recipe; remove one")
    asked = strategy if strategy != "auto" else option
    if asked == "auto":
        return [
            name
            for name, kind in STRATEGIES.items()
            if (kind.is_choice_of_one_rank if ranks == 1 else not kind.for_one_process)
        ]
    check_strategy_name(asked, f"--strategy {asked}")
    if other := STRATEGIES[asked].planned_as:
        raise UserError(
            f"--strategy {asked}: keeps on each GPU what {other} keeps on one; plan --strategy {other} --ranks 1"
        )
    if STRATEGIES[asked].for_one_process and ranks > 1:
        raise UserError(f"--strategy {asked} is for one process, not --ranks {ranks}")
    return (asked,)


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _quiet(_: str) -> None:
    pass

"""`shardlaunch sweep`: check the request, run the trials, show what they have found."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.run_lock import locked
from shardlaunch.errors import UserError, printable
from shardlaunch.launcher.command_line.parsing import parse_options
from shardlaunch.launcher.commands.doctor.recipe import load_recipe
from shardlaunch.launcher.commands.installed import find_recipe
from shardlaunch.launcher.commands.sweep.record import (
    SweepRecord,
    check_folder,
    fixed_values,
    new_record,
    read_sweep,
    write_sweep,
)
from shardlaunch.launcher.commands.sweep.results import show
from shardlaunch.launcher.commands.sweep.search import DATABASE, PRUNERS, SAMPLERS, Search, check_optuna, describe
from shardlaunch.launcher.commands.sweep.space import Parameter, grid, read_space
from shardlaunch.launcher.commands.sweep.trials import Trials
from shardlaunch.launcher.option_fields import flag
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, check_in_effect, options_type_of, recipe_name
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX, EVAL_PREFIXES
from shardlaunch.launcher.runs.folder import run_folder
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.resolve import check_strategy_name
from shardlaunch.sharding.world import available_cores

MIN, MAX = "min", "max"
_NOT_FIXED = {
    **dict.fromkeys(("output_dir", "run_name"), "each has a folder in that of the sweep, --output-dir before ` -- `"),
    **dict.fromkeys(("resume", "extend_to_steps"), "each begins anew, and resumes by itself"),
    **dict.fromkeys(("stop_at_step", "max_time"), "none would come to its end"),
    "save_to": "all would be copied to the same place",
}
_LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for on the command line, besides the recipe, the space and the options of all trials."""

    trials: int = 20
    at_once: int = 1
    ranks: int = 0
    strategy: str = "auto"
    max_restarts: int = 0
    objective: str = ""
    direction: str = "auto"
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0
    output_dir: Path | None = None
    as_json: bool = False


def sweep(recipe: str, recipe_argv: Sequence[str], *, space: Path | None, request: Request) -> int:
    """Run a sweep, or show the one in the folder `recipe`, and return the exit status. Raises UserError."""
    check_optuna()
    folder = Path(os.path.expanduser(recipe))
    if folder.is_dir():
        if space is not None or recipe_argv:
            raise UserError(
                f"{recipe}: is a folder, whose sweep is shown without --space and words after ` -- `; to search, name "
                f"a recipe"
            )
        return show_sweep(folder, as_json=request.as_json)
    path = find_recipe(recipe)
    if space is None:
        raise UserError("sweep: needs --space FILE, which says what is searched, such as lr: {low: 1e-5, high: 1e-2}")
    _check_request(request)
    recipe_type, findings = load_recipe(path)
    if recipe_type is None:
        raise UserError("; ".join(finding.text for finding in findings))
    options_type = options_type_of(recipe_type)

    def parsed(words: Sequence[str]) -> Options:
        return parse_options(options_type, recipe_type.presets, words, program=path.name, description="")

    fixed = parsed(recipe_argv)
    _check_fixed(fixed)
    parameters = read_space(space, options_type, fixed.explicitly_set)

    def check(words: Sequence[str]) -> None:
        check_in_effect(recipe_type(parsed([*recipe_argv, *words])))

    check([])
    _check_choices(space, parameters, lambda one, choice: check(one.words(choice, options_type)))
    num_trials = request.trials
    if request.sampler == "grid":
        size = 1
        for values in grid(parameters).values():
            size *= len(values)
        num_trials = min(size, num_trials)
    objective = _objective(request.objective or recipe_type.best_metric)
    direction = request.direction if request.direction != "auto" else _direction(recipe_type, fixed, objective)
    layout = _layout(request, fixed)
    own = ["--ranks", str(layout.ranks)]
    own += ["--strategy", request.strategy] if request.strategy != "auto" else []
    own += ["--max-restarts", str(request.max_restarts)] if request.max_restarts else []
    record = new_record(
        recipe=recipe_name(recipe_type),
        recipe_words=[recipe, *own, "--", *recipe_argv],
        objective=objective,
        direction=direction,
        space={name: one.described() for name, one in parameters.items()},
        fixed=fixed_values(fixed, [*parameters]),
        sampler=request.sampler,
        pruner=request.pruner,
        seed=request.seed,
    )
    folder = (request.output_dir or _default_folder(fixed, recipe_name(recipe_type))).expanduser()
    say = _say_beside if request.as_json else _say
    is_resumed = check_folder(folder, record)
    with locked(folder):
        write_sweep(folder, record)
        search = Search(folder, parameters, **asked_of(record))
        begun = f"goes on, with {len(search.trials())} of {num_trials} trials" if is_resumed else f"{num_trials} trials"
        say(f"sweep {folder}: {begun}, {objective} to the {'least' if record.is_min else 'greatest'}")
        for name, values in record.space.items():
            say(f"  {flag(name)}: {values}")
        say(describe(request.sampler, request.pruner, request.seed))
        say(layout.about)

        def command(run_dir: Path, words: Sequence[str]) -> list[str]:
            options = [*recipe_argv, *layout.words, *words, "--output-dir", str(run_dir)]
            return ["run", str(path), *own, "--", *options]

        def words_of(values: Mapping[str, Any]) -> list[str]:
            words = [word for name, one in parameters.items() for word in one.words(values[name], options_type)]
            check(words)
            return words

        trials = Trials(
            folder,
            search,
            objective=objective,
            places=layout.environments,
            command=command,
            words_of=words_of,
            say=say,
        )
        status = trials.run(num_trials)
        if status:
            say("the sweep has stopped; the same command goes on")
            return status
        return show(folder, record, search, as_json=request.as_json)


def show_sweep(folder: Path, *, as_json: bool) -> int:
    """Show the sweep in a folder, running or not. Raises UserError where there is none."""
    record = read_sweep(folder)
    if not (folder / DATABASE).exists():
        raise UserError(f"{folder}: its sweep has no trials: {DATABASE} is missing")
    return show(folder, record, Search(folder, {}, **asked_of(record)), as_json=as_json)


def asked_of(record: SweepRecord) -> dict[str, Any]:
    """Return what a search takes of a record."""
    return {"sampler": record.sampler, "pruner": record.pruner, "seed": record.seed, "is_min": record.is_min}


def _check_request(request: Request) -> None:
    for name in ("trials", "at_once"):
        if getattr(request, name) < 1:
            raise UserError(f"{flag(name)} {getattr(request, name)}: must be at least 1")
    for name in ("ranks", "max_restarts", "seed"):
        if getattr(request, name) < 0:
            raise UserError(f"{flag(name)} {getattr(request, name)}: must be at least 0")
    for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("direction", ("auto", MIN, MAX))):
        if getattr(request, name) not in known:
            raise UserError(f"{flag(name)} {getattr(request, name)}: must be one of {', '.join(known)}")
    if request.strategy != "auto":
        check_strategy_name(request.strategy, f"--strategy {request.strategy}")


def _check_fixed(options: Options) -> None:
    """Raise UserError for options after ` -- ` that trials cannot have, all of them at once."""
    problems = [
        f"{flag(name)}: not among the options of a sweep's trials: {why}; remove it"
        for name, why in _NOT_FIXED.items()
        if name in options.explicitly_set
    ]
    if problems:
        raise UserError("\n".join(problems))


def _check_choices(path: Path, parameters: Mapping[str, Parameter], check: Callable[[Parameter, str], None]) -> None:
    """Raise UserError for choices that no trial can have, all of them at once.

    `check` raises for a choice beside the options after ` -- `. An error that names another option too may be none
    beside another value of that.
    """
    problems = []
    for one in parameters.values():
        for choice in one.choices:
            try:
                check(one, choice)
            except UserError as error:
                if {*re.findall(r"--[a-z0-9-]+", str(error))} == {flag(one.name)}:
                    problems.append(f"--space {path}: {error}")
    if problems:
        raise UserError("\n".join(problems))


def _objective(name: str) -> str:
    return name if name.startswith(EVAL_PREFIXES) else f"{EVAL_PREFIX}{name}"


def _direction(recipe_type: type[Recipe], options: Options, objective: str) -> str:
    """Return whether a lower or a higher objective is better. Raises UserError if that is not known."""
    name = objective.partition("/")[2]
    if name in _LOWER_IS_BETTER:
        return MIN
    recipe = recipe_type(options)
    recipe.class_names = recipe.class_names or ("0", "1", "2")  # the data, which say how many, are not read here
    try:
        is_higher_better = getattr(recipe.metrics().get(name), "higher_is_better", None)
    except Exception:  # of the recipe's own code, which may need the data
        is_higher_better = None
    if is_higher_better is None:
        raise UserError(f"--objective {objective}: say which is better, --direction min or --direction max")
    return MAX if is_higher_better else MIN


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the trials share the machine."""

    ranks: int
    environments: Sequence[Mapping[str, str]]
    """Variables of each of those side by side."""
    words: Sequence[str]
    """Options of all of them."""
    about: str


def _layout(request: Request, options: Options) -> Layout:
    """Return how trials share cores or GPUs. Raises UserError for more ranks than there are GPUs."""
    count = request.at_once
    beside = f"{count} trials at once, " if count > 1 else "one trial at a time, "
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() and not read_environment().use_cpu else 0
    if num_gpus:
        ranks = request.ranks or num_gpus // count
        if ranks * count > num_gpus or not ranks:
            raise UserError(
                f"--at-once {count} --ranks {request.ranks or 1}: need {count * max(1, ranks)} GPUs, and this machine "
                f"has {num_gpus}; lower one of the two, or set ACCELERATE_USE_CPU=true"
            )
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = names if len(names) == num_gpus and all(names) else [*map(str, range(num_gpus))]
        shares = [devices[first * ranks : (first + 1) * ranks] for first in range(count)]
        environments = [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]
        return Layout(ranks=ranks, environments=environments, words=(), about=f"{beside}each on {ranks} GPUs")
    ranks = request.ranks or 1
    about = f"{beside}each on {ranks} rank{'s' * (ranks > 1)} of the CPU"
    if count == 1 or options.threads_per_rank or options.exact:
        return Layout(ranks=ranks, environments=[{}] * count, words=(), about=about)
    threads = max(1, available_cores() // (count * ranks))
    return Layout(
        ranks=ranks,
        environments=[{}] * count,
        words=("--threads-per-rank", str(threads)),
        about=f"{about} with {threads} thread{'s' * (threads > 1)} each",
    )


def _default_folder(options: Options, name: str) -> Path:
    folder = run_folder(options, name)
    return folder.with_name(f"{folder.name}-sweep")


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _say_beside(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)

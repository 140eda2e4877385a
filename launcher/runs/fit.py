"""Run a recipe in this process: resolve options and strategy, join the ranks, train. Used by `launch` and notebooks."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from shardlaunch.launcher.command_line.parsing import naming_origins, options_from_keywords
from shardlaunch.launcher.launched import mark_launched
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, check_in_effect, has_own_step, options_type_of, recipe_name
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.phases import phase, shown_by
from shardlaunch.launcher.runs.folder import run_folder
from shardlaunch.launcher.runs.result import Result
from shardlaunch.launcher.runs.session import preserved_process, silent_libraries
from shardlaunch.launcher.runs.settings import settings_of
from shardlaunch.launcher.training.stopping import Stopped
from shardlaunch.sharding.environment import (
    JOB_END_VARIABLE,
    LaunchEnvironment,
    end_of_job,
    read_environment,
    tell_libraries,
)
from shardlaunch.sharding.precision import resolve_precision
from shardlaunch.sharding.world import World, abandon, connect, disconnect, threads_per_rank

if TYPE_CHECKING:
    from shardlaunch.launcher.runs.run import Run

    Work = Callable[[Run], Result]


def fit(recipe: Recipe | type[Recipe], *, show: bool = False, callbacks: Sequence[Any] = (), **options: Any) -> Result:
    """Train a recipe and return the outcome. All ranks.

    `recipe` is a recipe class or instance; `options` are its command-line options by their Python names, which override
    those of the instance, a preset and a YAML file; `callbacks` are objects or classes derived from
    `shardlaunch.Callback`, or texts as for --callback. Runs in this process, and joins the other ranks if torchrun or
    `accelerate launch` started several. Prints nothing unless `show`; warnings are Python warnings. Leaves environment,
    threads and random generators of the process as they were. May be called repeatedly; if the output folder already
    holds this run, it is resumed.

    Raises UserError for errors that the user can fix, and never exits.
    """
    recipe_type, instance = (recipe, None) if isinstance(recipe, type) else (type(recipe), recipe)
    mark_launched(recipe_type)
    base = instance.options if instance is not None else None
    with preserved_process(), silent_libraries():
        parsed = options_from_keywords(options_type_of(recipe_type), recipe_type.presets, options, base=base)
        env = read_environment()
        display = new_display(env, show=show)
        with naming_origins(parsed.origins), shown_by(display.phases):
            choice = choose(parsed, env)
            with joined_ranks(env, parsed, choice, display) as world:
                try:
                    return run_recipe_on(recipe, parsed, env, world, choice, display, callbacks)
                except Stopped:
                    return Result.of_folder(run_folder(parsed, recipe_name(recipe_type)))
                except BaseException:
                    abandon(world)
                    raise


def new_display(env: LaunchEnvironment, *, show: bool) -> Display:
    """Return what a person sees of a run: with `show`, on rank 0, lines and bars; else Python warnings alone."""
    return Display(silent=not (show and env.rank == 0), on_warning=None if show else _warn)


class Choice(NamedTuple):
    """Strategy and precision of a run, by name."""

    strategy: str
    precision: str


def choose(options: Options, env: LaunchEnvironment) -> Choice:
    """Return strategy and precision from options and launch environment. Raises UserError if these contradict."""
    with phase("loading libraries"):  # here, so that a person sees something before
        from shardlaunch.launcher.runs import cross_validation  # noqa: F401 - and with it all that a run needs
        from shardlaunch.sharding.resolve import check_quantized_base, resolve_strategy
    strategy = resolve_strategy(options.strategy, env)
    if options.lora_base_bits:
        check_quantized_base(strategy)
    return Choice(
        strategy=strategy,
        precision=resolve_precision(options.precision, env.accelerate_precision),
    )


@contextmanager
def joined_ranks(
    env: LaunchEnvironment, options: Options, choice: Choice, display: Display, *, is_watched: bool = False
) -> Iterator[World]:
    """Join the ranks of this launch and set this rank's number of threads; leave them at the end. All ranks.

    `is_watched`: the caller runs a watchdog while it has joined.
    """
    from shardlaunch.sharding.resolve import STRATEGIES

    _say_launch(env, options, display)
    with phase(f"connecting {env.world_size} ranks") if env.world_size > 1 else nullcontext():
        world = connect(
            env,
            needs_group=STRATEGIES[choice.strategy].is_sharded,
            is_watched=is_watched,
            model_ranks=options.tensor_parallel,
        )
    if world.says:
        display.say(world.says)
    tell_libraries(env, local_rank=world.local_index, local_size=world.local_size)
    # How many threads a kernel has changes its bits: with --exact it must not be the cores that happen to be there.
    num_threads = threads_per_rank(options.threads_per_rank or int(options.exact), env, world)
    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # otherwise accelerate sets its own number, with a warning
    yield world
    disconnect(world)


def _say_launch(env: LaunchEnvironment, options: Options, display: Display) -> None:
    """Print what was found in the environment of a cluster."""
    for warning in env.warnings:
        display.warn(warning)
    if env.is_found:
        display.say(f"started by {env.launcher}: {env.describe()}")
    job_ends_at, problem = end_of_job()
    if options.max_time:
        return
    if problem:
        display.warn(problem)
    if job_ends_at is not None:
        left = timedelta(seconds=round(job_ends_at - time.time()))
        display.say(f"the job ends in {left} ({JOB_END_VARIABLE}): the run saves and stops before (or set --max-time)")


def run_recipe_on(
    recipe: Recipe | type[Recipe],
    options: Options,
    env: LaunchEnvironment,
    world: World,
    choice: Choice,
    display: Display,
    callbacks: Sequence[Any] = (),
    work: "Work | None" = None,
) -> Result:
    """Run a recipe, or each of its folds, on connected ranks, and return the outcome. All ranks. Raises UserError.

    `work` takes the run in the place of all that.
    """
    from shardlaunch.launcher.reporting.planned import comparison, planned_peak
    from shardlaunch.launcher.runs.callbacks import Callbacks
    from shardlaunch.launcher.runs.cross_validation import cross_validate
    from shardlaunch.launcher.runs.loading_callbacks import callback_makers, check_signatures
    from shardlaunch.launcher.runs.resume_check import check_resume
    from shardlaunch.launcher.runs.run import Run
    from shardlaunch.sharding.exact_kernels import deterministic_kernels
    from shardlaunch.sharding.resolve import check_exact, check_ranks, check_settings, check_tensor_parallel

    recipe_type = recipe if isinstance(recipe, type) else type(recipe)
    check_ranks(env, world, _accelerate_ranks(world))
    settings = settings_of(recipe_type, options, choice.precision, env)
    check_settings(choice.strategy, settings)
    if options.exact:
        check_exact(
            choice.strategy,
            world,
            num_micro_batches=options.micro_batches,
            compiles=options.compile,
            has_own_step=has_own_step(recipe_type),
        )
    if world.model_ranks > 1:
        check_tensor_parallel(choice.strategy, world.model_ranks, world.size, compiles=options.compile)

    def new_recipe(options: Options) -> Recipe:
        """Return a recipe without the state of other folds: recipes store facts about their data."""
        if isinstance(recipe, type):
            return recipe(options)
        copied = copy(recipe)
        copied.options = options
        return copied

    check_in_effect(new_recipe(options))
    check_signatures(recipe_type, recipe_type.__name__)
    makers = world.peers.together(lambda: callback_makers(options.callback, callbacks))
    first_states: dict[str, dict[str, Any]] = {}

    def new_run(options: Options, display: Display, fold: int | None = None) -> "Run":
        return Run(new_recipe(options), options, world, choice.strategy, choice.precision, settings, fold, display)

    def run_of(fold: int | None = None) -> "Run":
        run = new_run(options, display, fold)
        run.callbacks = Callbacks(run, [make() for make in makers], first_states)
        return run

    planned = world.peers.together(lambda: planned_peak(options.plan, choice.strategy, world) if options.plan else 0)
    with deterministic_kernels() if options.exact else nullcontext():
        if work is not None:
            return work(run_of())
        if options.check:
            check_resume(new_run, options, display)
        result = cross_validate(run_of, options.folds) if options.folds else run_of().run()
    if planned:
        display.say(comparison(planned, world))
    return result


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _accelerate_ranks(world: World) -> int:
    """Return accelerate's number of ranks; it uses the existing process group."""
    from accelerate import PartialState

    # The strategy initializes DeepSpeed; accelerate would initialize it with another process group.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)

    return int(PartialState(cpu=world.device.type == "cpu").num_processes)

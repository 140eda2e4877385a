"""The entry of every recipe file: the command line, the ranks, and what a person is told when something ends a run."""

import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from typing import get_type_hints

import torch

from shardlaunch.errors import UserError
from shardlaunch.launcher.launched import mark_launched
from shardlaunch.launcher.options import Options, parse_options
from shardlaunch.launcher.recipe import Recipe, check_in_force, recipe_name
from shardlaunch.launcher.runs.cross_validation import cross_validate
from shardlaunch.launcher.runs.run import Run
from shardlaunch.sharding.environment import is_main_process, read_environment
from shardlaunch.sharding.precision import PRECISIONS, resolve_precision
from shardlaunch.sharding.resolve import STRATEGIES, check_ranks, check_settings, resolve_strategy
from shardlaunch.sharding.strategy import Settings
from shardlaunch.sharding.world import World, connect, disconnect, threads_per_rank

# A normal run's output is the run's own; whoever sets these variables gets the libraries' output too.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",
    "TOKENIZERS_PARALLELISM": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Before the ranks are connected, rank 0 speaks for all. A rank that ended first would have the launcher end rank 0 too,
# so the others wait to be ended.
LAST_WORD_S = 60
# A rank's mistake is mostly every rank's, if a little later; but some may be waiting for just this one to end.
LINGER_S = 5.0
# What gloo, NCCL and the store say when the other side is gone.
_LOST_CONTACT = re.compile(r"connection (was )?(closed|reset|refused)|reset by peer|broken pipe|remote process", re.I)
EXIT_OTHER_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def launch(recipe_type: type[Recipe]) -> None:
    """Run the recipe as the command line says. The last line of every recipe file; does nothing when it is imported."""
    if recipe_type.__module__ == "__main__":
        mark_launched(recipe_type)
        try:
            status = main(recipe_type, sys.argv[1:])
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            status = EXIT_OTHER_ERROR
        # Threads of gloo may outlive the process group: the interpreter, taking itself down around them, now and then
        # aborts ("terminate called without an active exception") and makes a failure of a run that went well. And it
        # would wait for loading processes, which leave signals to the rank. All that is to be kept is closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(recipe_type: type[Recipe], argv: Sequence[str]) -> int:
    """Run a recipe with the given command-line words and return the exit status. All ranks.

    0: done; 1: another rank is gone; 2: something for the user to mend, said in one message; 130: interrupted. Other
    errors are raised.
    """
    _silence_libraries()
    world: World | None = None
    is_debug = "--debug" in argv
    try:
        env = read_environment()
        options = _options(recipe_type, argv)
        is_debug = options.debug
        strategy_name = resolve_strategy(options.strategy, env)
        precision_name = resolve_precision(options.precision, env.accelerate_precision)
        num_threads = threads_per_rank(options.threads_per_rank, env)
        torch.set_num_threads(num_threads)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # or accelerate sets a number of its own, with a warning
        world = connect(env, needs_group=STRATEGIES[strategy_name].is_sharded)
        check_ranks(env, world, _accelerate_ranks(world))
        settings = Settings(
            compute_dtype=PRECISIONS[precision_name],
            layer_classes=options.layer_classes or env.layer_classes or recipe_type.layer_classes,
            reshard_after_forward=options.reshard_after_forward and env.reshard_after_forward,
            cpu_offload=options.cpu_offload or env.cpu_offload,
            shard_ranks=options.shard_ranks or env.shard_ranks,
        )
        check_settings(strategy_name, settings)
        check_in_force(recipe_type(options))

        def run_of(fold: int | None = None) -> Run:
            return Run(recipe_type(options), options, world, strategy_name, precision_name, settings, fold)

        if options.folds:
            cross_validate(run_of, options.folds)
        else:
            run_of().run()
    except SystemExit as exit_:  # the command line's own message or help
        if exit_.code and not is_main_process():
            time.sleep(LAST_WORD_S)
        raise
    except UserError as error:
        _report(world, f"error: {error}", with_traceback=is_debug)
        if world is not None:
            world.await_others_at("report", most_s=LINGER_S)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _report(
            world,
            "interrupted; the same command resumes from the last checkpoint, if there is one",
            with_traceback=False,
        )
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        if not _LOST_CONTACT.search(str(error)):
            raise
        message = (
            "error: lost contact with another rank, which failed (then its own message says why) or was killed. "
            "The same command resumes from the last checkpoint."
        )
        _report(world, message, with_traceback=is_debug)
        return EXIT_OTHER_ERROR
    disconnect(world)
    return 0


def _silence_libraries() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # imported by the recipe's file, before it could see the variables
        from transformers.utils import logging

        if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
            logging.set_verbosity_error()
        logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def _options(recipe_type: type[Recipe], argv: Sequence[str]) -> Options:
    options_type: type[Options] = get_type_hints(recipe_type)["options"]
    description = (recipe_type.__doc__ or recipe_type.__name__).strip()
    return parse_options(
        options_type,
        recipe_type.presets,
        argv,
        program=f"{recipe_name(recipe_type)}.py",
        description=description,
        show=is_main_process(),
    )


def _accelerate_ranks(world: World) -> int:
    """Return how many ranks accelerate counts; it takes over the process group that is there."""
    from accelerate import PartialState

    # DeepSpeed is for the strategy to start; started by accelerate it would look for another process group.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)

    return int(PartialState(cpu=world.device.type == "cpu").num_processes)


def _report(world: World | None, message: str, *, with_traceback: bool) -> None:
    """Print a message once, from the first rank that has one; each rank's traceback where asked for."""
    if with_traceback:
        traceback.print_exc()
    if world.is_first_to("report") if world is not None else is_main_process():
        print(message, file=sys.stderr, flush=True)
    elif world is None:
        time.sleep(LAST_WORD_S)
        print(message, file=sys.stderr, flush=True)  # still here: rank 0 has nothing to say

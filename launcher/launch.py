"""The entry point of recipe files: the command line, exit statuses, and messages when a run ends early."""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from shardlaunch.checkpoints.files import COME_AGAIN, error_text
from shardlaunch.errors import EXIT_OTHER_ERROR, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from shardlaunch.launcher.command_line.parsing import naming_origins, parse_options
from shardlaunch.launcher.launched import mark_launched
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, options_type_of, recipe_name
from shardlaunch.launcher.reporting.streams import survive_closed_output
from shardlaunch.launcher.training.stopping import INTERRUPTED, Stopped, interrupted_status, signals_kept
from shardlaunch.sharding.environment import has_agent, is_main_process, read_environment

if TYPE_CHECKING:
    from shardlaunch.launcher.runs.fit import Work
    from shardlaunch.sharding.world import World

# Before the ranks are connected, rank 0 prints for all. If another rank exited first, the launcher would end rank 0
# too, so the others wait to be ended. Without a launcher nothing ends them: they print after rank 0.
EXIT_DELAY_S = 60
EXIT_DELAY_ALONE_S = 3
# Other ranks mostly fail with the same error a little later, but some may be waiting for this one to end.
LINGER_S = 5.0
# Errors of gloo and NCCL when the other side is gone.
_LOST_CONTACT = re.compile(r"connection (was )?(closed|reset|refused)|reset by peer|broken pipe|remote process", re.I)


def launch(recipe_type: type[Recipe]) -> None:
    """Run the recipe with the options on the command line, then exit. The last line of every recipe file.

    Does nothing when the file is imported. Raises UserError in notebooks and interactive sessions, which would be
    ended: use `fit` there.
    """
    if sys._getframe(1).f_globals.get("__name__") != "__main__":  # the file, not the class: that may be imported
        return
    mark_launched(recipe_type)
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        raise UserError(
            f"launch({recipe_type.__name__}) reads a command line and exits; in a notebook or an interactive session "
            f"call shardlaunch.fit({recipe_type.__name__}, lr=..., ...) instead"
        )
    run_and_exit(recipe_type)


def run_and_exit(recipe_type: type[Recipe], work: "Work | None" = None) -> NoReturn:
    """Run the recipe with the options on the command line, then exit. `work`: see `main`."""
    survive_closed_output()
    try:
        status = main(recipe_type, sys.argv[1:], work)
    except SystemExit as exit_:  # from --help or the recipe's own code
        if not isinstance(exit_.code, int | None):
            print(exit_.code, file=sys.stderr)
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        status = EXIT_OTHER_ERROR
    # os._exit, because threads of gloo may outlive the process group: a normal exit then sometimes aborts ("terminate
    # called without an active exception"), and a successful run fails. It would also wait for data-loading processes,
    # which ignore signals, and tearing torch down takes a third as long as importing it. All files are closed by now.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed when the process began, and its descriptor taken since
            stream.flush()
    os._exit(status)


def main(recipe_type: type[Recipe], argv: Sequence[str], work: "Work | None" = None) -> int:
    """Run a recipe with the given command-line words and return the exit status. All ranks.

    `work` does something else with the run than to train it to its end.

    0: success; 1: lost contact with another rank, or an error of the file system; 2: UserError, printed as one message;
    75: stopped when asked to; 130: interrupted. Other errors are raised.
    """
    world: World | None = None
    is_debug = "--debug" in argv
    try:
        options = _options(recipe_type, argv)
        is_debug = options.debug
        from shardlaunch.launcher.reporting.phases import shown_by
        from shardlaunch.launcher.runs.fit import choose, joined_ranks, new_display, run_recipe_on
        from shardlaunch.launcher.runs.folder import run_folder
        from shardlaunch.launcher.runs.session import silent_libraries
        from shardlaunch.launcher.training.watchdog import watched

        env = read_environment()
        with ExitStack() as stack:
            stack.enter_context(naming_origins(options.origins))
            stack.enter_context(silent_libraries())
            stack.enter_context(signals_kept(is_main=env.rank == 0))
            display = new_display(env, show=True)
            stack.enter_context(shown_by(display.phases))
            choice = choose(options, env)
            after_s = options.hang_after_s
            world = stack.enter_context(joined_ranks(env, options, choice, display, is_watched=after_s > 0))
            output_dir = run_folder(options, recipe_name(recipe_type))
            stack.enter_context(watched(world, after_s=after_s, output_dir=output_dir))
            result = run_recipe_on(recipe_type, options, env, world, choice, display, work=work)
            if env.result_file and world.is_main:
                with open(env.result_file, "w") as file:
                    json.dump({"run_dir": str(result.run_dir.absolute())}, file)
    except UserError as error:
        _report(world, f"error: {error}", with_traceback=is_debug)
        if world is not None:
            world.await_others_at("report", most_s=LINGER_S)
        return EXIT_USER_ERROR
    except Stopped as stop:
        assert world is not None
        if world.is_main:
            _print(stop, sys.stdout)
        world.is_first_to("stop")
        world.await_others_at("stop", most_s=LINGER_S)
        return EXIT_STOPPED
    except KeyboardInterrupt as interrupt:
        _report(world, INTERRUPTED, with_traceback=False)
        return interrupted_status(*interrupt.args)
    except RuntimeError as error:
        is_alone = world is not None and world.size == 1
        if is_alone or not _has_lost_contact(error):
            raise
        message = (
            "error: lost contact with another rank, which failed (see its own message) or was killed. "
            "The same command resumes from the last checkpoint."
        )
        _report(world, message, with_traceback=is_debug)
        return EXIT_OTHER_ERROR
    except OSError as error:
        message = (
            f"error: {error_text(error)}{_place(error)}. {COME_AGAIN} from the last checkpoint, if there is one. "
            f"--debug shows more"
        )
        _report(world, message, with_traceback=is_debug)
        if world is not None:
            from shardlaunch.sharding.world import abandon

            abandon(world)  # the others, which wait for this rank, find out now that it has left
            world.await_others_at("report", most_s=LINGER_S)
        return EXIT_OTHER_ERROR
    return 0


def _has_lost_contact(error: RuntimeError) -> bool:
    """Return whether an error says that another rank, or the store, is gone."""
    from torch.distributed import DistNetworkError, DistStoreError

    return isinstance(error, DistNetworkError | DistStoreError) or bool(_LOST_CONTACT.search(str(error)))


def _options(recipe_type: type[Recipe], argv: Sequence[str]) -> Options:
    return parse_options(
        options_type_of(recipe_type),
        recipe_type.presets,
        argv,
        program=f"{recipe_name(recipe_type)}.py",
        description=(recipe_type.__doc__ or recipe_type.__name__).strip(),
        show=is_main_process(),
    )


def _place(error: OSError) -> str:
    """Return where in the user's own code an error came up, if it did."""
    ours = (str(Path(__file__).resolve().parent), str(Path(os.__file__).parent), sys.prefix)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(ours) and "shardlaunch" not in Path(frame.filename).parts:
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _report(world: "World | None", message: str, *, with_traceback: bool) -> None:
    """Print a message once, from the first rank that has one, and optionally each rank's traceback."""
    if with_traceback:
        traceback.print_exc()
    if world.is_first_to("report") if world is not None else is_main_process():
        _print(message, sys.stderr)
    elif world is None:
        time.sleep(EXIT_DELAY_S if has_agent() else EXIT_DELAY_ALONE_S)
        _print(message, sys.stderr)  # rank 0 has not failed


def _print(text: object, stream: IO[str]) -> None:
    """Print a line, where the output can be written."""
    with suppress(OSError):
        print(text, file=stream, flush=True)

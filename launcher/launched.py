"""A recipe file that ends without a launch: nothing was trained, and that is said."""

import ast
import atexit
import os
import sys
import time
from pathlib import Path
from typing import Any

from shardlaunch.sharding.environment import is_main_process

MAIN = "__main__"
EXIT_STATUS = 2
LINGER_S = 5.0  # for rank 0 to say it first: a launcher ends it soon after another rank has failed
_PACKAGE = __name__.partition(".")[0]
_LAUNCHES = ("launch", "fit", "start")
_declared: dict[str, int] = {}  # recipes of the file that is run, each with the process that declared it
_launched: set[type] = set()


def watch(recipe_type: type) -> None:
    """Note that a recipe is declared; if it is so by the file that is run, see at its end that something was launched.

    Notebooks, interactive sessions and modules that are imported are not watched.
    """
    file = getattr(sys.modules.get(MAIN), "__file__", None)
    if recipe_type.__module__ == MAIN and file and not hasattr(sys, "ps1") and not sys.flags.interactive:
        if not _declared:
            atexit.register(_check, Path(file).resolve())
        _declared[recipe_type.__name__] = os.getpid()


def mark_launched(recipe_type: type) -> None:
    """Note that a recipe is run. Called by all that run one."""
    _launched.add(recipe_type)


def _check(file: Path) -> None:
    """End with a message and exit status 2 if recipes were declared and none was launched, where no error ended it."""
    names = [name for name, process in _declared.items() if process == os.getpid()]
    is_failed = getattr(sys, "last_value", None) is not None or getattr(sys, "last_exc", None) is not None
    if not names or _launched or is_failed or _has_launch(file):  # one is enough: others of the file may be its bases
        return
    name = names[-1]
    sys.stdout.flush()
    if is_main_process():
        message = f"error: {file.name} declares the recipe {name} and does not launch it: nothing was trained. "
        print(f"{message}End the file with `launch({name})`.", file=sys.stderr, flush=True)
    else:
        time.sleep(LINGER_S)
    os._exit(EXIT_STATUS)


def _has_launch(file: Path) -> bool:
    """Return whether the file that was run has a call, which this start did not reach, that would launch its recipe."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True
    return any(isinstance(node, ast.Call) and _launches(node, vars(sys.modules[MAIN])) for node in ast.walk(tree))


def _launches(call: ast.Call, names: dict[str, Any]) -> bool:
    """Return whether it is a call of ours that runs a recipe; `names` are those of the file."""
    function = call.func
    if isinstance(function, ast.Attribute):
        called, owner = function.attr, function.value
        module = getattr(names.get(owner.id), "__name__", "") if isinstance(owner, ast.Name) else ""
    else:
        called = function.id if isinstance(function, ast.Name) else ""
        module = getattr(names.get(called), "__module__", _PACKAGE)  # unknown here: imported where it is called
    if called not in _LAUNCHES or module.partition(".")[0] != _PACKAGE:
        return False
    argument = call.args[0] if call.args else None
    given = names.get(argument.id) if isinstance(argument, ast.Name) else None
    # `launch` leaves recipes of other modules alone.
    return called != "launch" or getattr(given, "__module__", MAIN) == MAIN

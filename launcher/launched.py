"""Detect recipe files that end without launching their recipe, and report it."""

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
LINGER_S = 5.0  # rank 0 prints the message; the launcher would end it soon after another rank has failed
_PACKAGE = __name__.partition(".")[0]
_LAUNCHES = ("launch", "fit", "start")
_declared: dict[str, int] = {}  # recipes declared in the main file, each with the process that declared it
_launched: set[type] = set()


def watch(recipe_type: type) -> None:
    """Record that a recipe is declared. If the main file declares it, check at exit that something was launched.

    Notebooks, interactive sessions and imported modules are not checked.
    """
    file = getattr(sys.modules.get(MAIN), "__file__", None)
    if recipe_type.__module__ == MAIN and file and not hasattr(sys, "ps1") and not sys.flags.interactive:
        if not _declared:
            atexit.register(_check, Path(file).resolve())
        _declared[recipe_type.__name__] = os.getpid()


def mark_launched(recipe_type: type) -> None:
    """Record that a recipe is run, or used in another way: it was not forgotten."""
    _launched.add(recipe_type)


def _check(file: Path) -> None:
    """Exit with a message and status 2 if recipes were declared but none was launched. Does nothing after an error."""
    names = [name for name, process in _declared.items() if process == os.getpid()]
    is_failed = getattr(sys, "last_value", None) is not None or getattr(sys, "last_exc", None) is not None
    if not names or _launched or is_failed or _has_launch(file):  # one launch is enough: the others may be base classes
        return
    name = names[-1]
    sys.stdout.flush()
    if is_main_process():
        message = f"error: {file.name} declares the recipe {name} but does not launch it, so nothing was trained. "
        print(f"{message}End the file with `launch({name})`.", file=sys.stderr, flush=True)
    else:
        time.sleep(LINGER_S)
    os._exit(EXIT_STATUS)


def _has_launch(file: Path) -> bool:
    """Return whether the main file contains a call that launches a recipe, even if it was not reached this time."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True
    return any(isinstance(node, ast.Call) and _launches(node, vars(sys.modules[MAIN])) for node in ast.walk(tree))


def _launches(call: ast.Call, names: dict[str, Any]) -> bool:
    """Return whether a call runs a recipe; `names` are the file's global names."""
    function = call.func
    if isinstance(function, ast.Attribute):
        called, owner = function.attr, function.value
        module = getattr(names.get(owner.id), "__name__", "") if isinstance(owner, ast.Name) else ""
    else:
        called = function.id if isinstance(function, ast.Name) else ""
        # A name that is not global is imported inside the function that calls it.
        module = getattr(names.get(called), "__module__", _PACKAGE)
    return called in _LAUNCHES and module.partition(".")[0] == _PACKAGE

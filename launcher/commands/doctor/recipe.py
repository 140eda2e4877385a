"""The recipe of the command that follows: its class, options and number of parameters, and its file."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe

DEMO = "demo"
MOST_QUOTED = 200
_MODULE = "shardlaunch_doctor_recipe"
BYTES_TRAINING = 16  # per parameter in fp32: weight, gradient, and AdamW's two moments
BYTES_SAVED = 12  # all of those but the gradient


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is known of the recipe and its options."""

    recipe_type: type[Recipe]
    options: Options
    name: str


def check_shadows(path: Path, search: Sequence[str]) -> list[Finding]:
    """Return which files beside a recipe are imported instead of libraries: its folder comes first on Python's path.

    `search` is Python's path.
    """
    folder = path.absolute().parent
    beside = sorted(folder.iterdir())
    importable = [one.stem for one in beside if one.suffix == ".py" or (one / "__init__.py").is_file()]
    others = [place for place in search if place and os.path.realpath(place) != os.path.realpath(folder)]
    shadowed = [
        name for name in importable if name in sys.stdlib_module_names or PathFinder.find_spec(name, others) is not None
    ]
    if not shadowed:
        return []
    several = len(shadowed) > 1
    return [
        problem(
            f"{folder}: {some(shadowed)} {'are' if several else 'is'} imported in place of the "
            f"{'libraries' if several else 'library'} of that name, when the recipe runs from there",
            "rename them" if several else "rename it",
        )
    ]


def load_command(path: Path, argv: Sequence[str]) -> tuple[Command | None, list[Finding]]:
    """Import a recipe file and read its options. None with a finding where the file fails.

    Raises UserError for options that the recipe refuses.
    """
    from shardlaunch.launcher.command_line.parsing import parse_options
    from shardlaunch.launcher.recipe import options_type_of, recipe_name

    recipe_type, findings = load_recipe(path)
    if recipe_type is None:
        return None, findings
    options = parse_options(options_type_of(recipe_type), recipe_type.presets, argv, program=path.name, description="")
    return Command(recipe_type=recipe_type, options=options, name=recipe_name(recipe_type)), []


def load_recipe(path: Path, class_name: str = "") -> tuple[type[Recipe] | None, list[Finding]]:
    """Import a recipe file and return its class: the one of a name, or the last. None with a finding where it fails."""
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.append(str(path.absolute().parent))  # the last, so that nothing there replaces a library here
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        return None, [problem(f"{path}: fails when it is imported: {type(error).__name__}: {error}", "fix the file")]
    recipes = [
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, Recipe) and one.__module__ == _MODULE
    ]
    if not recipes:
        return None, [problem(f"{path}: declares no recipe", "derive a class from shardlaunch.Recipe, and launch it")]
    named = [one for one in recipes if one.__name__ == class_name]
    leaves = [one for one in recipes if not any(other is not one and issubclass(other, one) for other in recipes)]
    return max(named or leaves, key=lambda one: inspect.getsourcelines(one)[1]), []


def count_parameters(command: Command) -> tuple[int, list[Finding]]:
    """Return the number of parameters of the recipe's model, 0 if it cannot be built without its data."""
    from shardlaunch.launcher.runs.model import build_empty_model
    from shardlaunch.launcher.runs.session import silent_libraries

    recipe = command.recipe_type(command.options)
    try:
        with silent_libraries():
            try:
                model = build_empty_model(recipe, command.options.seed)
            except AttributeError:  # of what datasets() would have stored
                if getattr(command.options, "data", "") != DEMO:
                    raise
                recipe.datasets()  # which are small
                model = build_empty_model(recipe, command.options.seed)
    except AttributeError:
        return 0, [note("the size of the model is not known: model() needs the data, which are not read here")]
    except Exception as error:  # of the recipe's own code
        why = str(error).partition("\n")[0][:MOST_QUOTED]
        return 0, [note(f"the size of the model is not known: model() fails ({type(error).__name__}: {why})")]
    count = sum(parameter.numel() for parameter in model.parameters())
    return count, [ok(f"{command.name}: {count / 1e6:,.1f} M parameters")]

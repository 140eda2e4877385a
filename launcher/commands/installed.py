"""The recipes that come with the package: find one by name, and list them."""

import inspect
import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

import shardlaunch
from shardlaunch.errors import UserError


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe, given as the path of a Python file or the name of an installed recipe.

    Raises UserError with similar names if there is no such recipe.
    """
    path = Path(os.path.expanduser(recipe))
    if path.is_file() and path.suffix == ".py":
        return path
    installed = _files()
    name = recipe.replace("-", "_")
    if name in installed:
        return installed[name]
    name = path.stem.replace("-", "_")
    near = [name] if name in installed else get_close_matches(name, installed, n=2)
    advice = f"did you mean {' or '.join(near)}?" if near else "`shardlaunch recipes` lists the installed ones"
    if path.suffix == ".py" or len(path.parts) > 1:
        raise UserError(
            f"{recipe}: no such recipe file (a Python file whose last line is `launch(YourRecipe)`); {advice}"
        )
    raise UserError(f"{recipe}: no such recipe; {advice}")


def list_recipes() -> None:
    """Print the installed recipes with a description and their presets."""
    from shardlaunch.launcher.recipe import Recipe

    files = _files()
    width = max(map(len, files))
    for name in files:
        module = import_module(f"shardlaunch.recipes.{name}")
        classes = [member for _, member in inspect.getmembers(module, inspect.isclass)]
        (recipe_type,) = [one for one in classes if issubclass(one, Recipe) and one.__module__ == module.__name__]
        description = (recipe_type.__doc__ or "").strip().splitlines()[0]
        print(f"{name:<{width}}  {description}\n{'':<{width}}  presets: {', '.join(recipe_type.presets) or 'none'}")
    print("\nTo train one: shardlaunch run NAME -- --preset PRESET")
    print("Its options: shardlaunch run NAME -- --help")


def _files() -> Mapping[str, Path]:
    """Return the installed recipe files by name."""
    assert shardlaunch.__file__ is not None
    folder = Path(shardlaunch.__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}

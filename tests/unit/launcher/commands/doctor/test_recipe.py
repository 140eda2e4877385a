"""The recipe of the command: shadowed libraries, files that fail, and the size of the model."""

import sys
from pathlib import Path

import pytest

from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.doctor import recipe
from tests.unit.launcher.commands.doctor.levels import fine, only, said

TEXT = """
import torch
from dataclasses import dataclass
from shardlaunch import Options, Recipe, launch

@dataclass(kw_only=True)
class MyOptions(Options):
    width: int = 4

class Base(Recipe):
    options: MyOptions
    def datasets(self): return {}
    def loss(self, outputs, batch): return outputs

class Mine(Base):
    def model(self): return MODEL

launch(Mine)
"""


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a recipe's folder does to Python's path."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["datasets.py"], "datasets is imported in place of the library"),
        (["torch/__init__.py", "json.py"], "json, torch are imported"),
    ],
)
def test_files_beside_a_recipe_with_names_of_libraries(names: list[str], part: str, tmp_path: Path) -> None:
    for name in [*names, "mine.py", "numpy/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    only(recipe.check_shadows(tmp_path / "mine.py", [str(tmp_path), *sys.path]), "problem", part)


def test_a_recipe_that_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    fine(recipe.check_shadows(tmp_path / "mine.py", [str(tmp_path), *sys.path]))


def written(folder: Path, model: str) -> Path:
    path = folder / "mine.py"
    path.write_text(TEXT.replace("MODEL", model))
    return path


def test_the_size_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "nets_beside_it.py").write_text("import torch\nNet = torch.nn.Linear\n")
    command, findings = recipe.load_command(
        written(tmp_path, "__import__('nets_beside_it').Net(self.options.width, 3)"), ["--width", "7"]
    )
    assert findings == []
    assert command is not None
    assert (command.name, command.recipe_type.__name__) == ("mine", "Mine")
    count, findings = recipe.count_parameters(command)
    assert count == 7 * 3 + 3
    fine(findings)


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("torch.nn.Linear(self.labels, 3)", "model() needs the data"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_size_that_is_not_known(model: str, part: str, tmp_path: Path) -> None:
    command, _ = recipe.load_command(written(tmp_path, model), [])
    assert command is not None
    count, findings = recipe.count_parameters(command)
    assert count == 0
    only(findings, "note", part)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("import no_such_library", "ModuleNotFoundError"),
        ("x = (", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("x = 1", "declares no recipe"),
    ],
)
def test_files_that_are_no_recipe(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    command, findings = recipe.load_command(path, [])
    assert command is None
    only(findings, "problem", part)


def test_options_that_a_recipe_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--widht"):
        recipe.load_command(written(tmp_path, "None"), ["--widht", "7"])
    assert said([], "ok") == ""

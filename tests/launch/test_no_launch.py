"""A recipe file that launches nothing ends with a message and status 2, unless it could have, or failed before."""

from pathlib import Path

import pytest

from tests.launch.command import ACCELERATE, PYTHON, SHARDLAUNCH, TORCHRUN, Ended, end_of, environment

FILE = """
import sys
from shardlaunch import Recipe, launch
from shardlaunch.launcher.launched import mark_launched
from shardlaunch.recipes.mnist_mlp import MnistMlp

class Mine(Recipe):
    pass

"""
MESSAGE = "error: own.py declares the recipe Mine but does not launch it, so nothing was trained."


def run_file(tmp_path: Path, last_lines: str, *command: str) -> Ended:
    """Run a file with a recipe and some last lines."""
    path = tmp_path / "own.py"
    path.write_text(FILE + last_lines)
    return end_of([*command, str(path)], environment(tmp_path))


@pytest.mark.parametrize(
    "command",
    [PYTHON, (*TORCHRUN, "--nproc-per-node", "2"), ACCELERATE, (*SHARDLAUNCH, "run", "--ranks", "2")],
    ids=["python", "torchrun", "accelerate", "shardlaunch"],
)
def test_forgotten(command: tuple[str, ...], tmp_path: Path) -> None:
    ended = run_file(tmp_path, "print('the end')", *command)
    assert ended.status > 0, ended.both
    assert ended.err.count(MESSAGE) == 1, ended.both
    assert "End the file with `launch(Mine)`" in ended.err
    assert "the end" in ended.out
    if command[0] != TORCHRUN[0] or command == PYTHON:
        assert (ended.status, ended.err.count("\n")) == (2, 1), ended.both


def test_what_launches_nothing(tmp_path: Path) -> None:
    """Other things than recipes are started too."""
    ended = run_file(tmp_path, "import threading\nthreading.Thread().start()", *PYTHON)
    assert (ended.status, ended.err.count(MESSAGE)) == (2, 1), ended.both


def test_a_recipe_that_is_imported_is_launched(tmp_path: Path) -> None:
    ended = run_file(tmp_path, "sys.argv.append('--help')\nlaunch(MnistMlp)", *PYTHON)
    assert ended.status == 0, ended.both
    assert "--hidden" in ended.out


@pytest.mark.parametrize(
    ("last_lines", "status"),
    [
        ("if len(sys.argv) > 1:\n    launch(Mine)", 0),
        ("import shardlaunch\nif len(sys.argv) > 1:\n    shardlaunch.launch(Mine)", 0),
        ("mark_launched(Mine)", 0),
        ("from shardlaunch import Options\nMine(Options())", 0),
        ("if len(sys.argv) > 1:\n    launch(MnistMlp)", 0),
        ("launch(Mine) if len(sys.argv) > 1 else sys.exit(3)", 3),
        ("raise RuntimeError('something else')", 1),
    ],
)
def test_not_forgotten(last_lines: str, status: int, tmp_path: Path) -> None:
    ended = run_file(tmp_path, last_lines, *PYTHON)
    assert ended.status == status, ended.both
    assert "does not launch it" not in ended.err


def test_a_module_that_is_imported(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FILE)
    words = [*PYTHON, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import own", str(tmp_path)]
    ended = end_of(words, environment(tmp_path))
    assert (ended.status, ended.err) == (0, ""), ended.both

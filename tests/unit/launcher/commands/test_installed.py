"""Recipes by name, and the command that lists them."""

import sys
from pathlib import Path

import pytest

import shardlaunch
from shardlaunch import UserError
from shardlaunch.errors import EXIT_USER_ERROR
from shardlaunch.launcher.commands.installed import find_recipe
from shardlaunch.launcher.commands.main import main
from tests.unit.launcher.test_imports import RECIPES, imported

INSTALLED = Path(shardlaunch.__file__).parent / "recipes"


def _shardlaunch(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["shardlaunch", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("name", ["bert_imdb", "bert-imdb"])
def test_an_installed_recipe_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert_imdb").mkdir()
    assert find_recipe(name) == INSTALLED / "bert_imdb.py"


def test_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bert_imdb.py", "mine.py"):
        (tmp_path / name).write_text("")
        assert find_recipe(name) == Path(name)
        assert find_recipe(str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        ("berd_imdb", r"^berd_imdb: no such recipe; did you mean bert_imdb\?$"),
        ("nosuch", "^nosuch: no such recipe; `shardlaunch recipes` lists"),
        ("nowhere/bert_imdb.py", r"no such recipe file .*; did you mean bert_imdb\?"),
        ("mine.py", "no such recipe file"),
        ("pyproject.toml", "no such recipe"),
        ("__init__", "no such recipe"),
    ],
)
def test_what_is_not_there_is_answered_with_the_nearest(recipe: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        find_recipe(recipe)


@pytest.mark.parametrize("command", ["run", "parity"])
def test_commands_refuse_unknown_recipes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _shardlaunch(monkeypatch, command, "mnist_mlb") == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: mnist_mlb: no such recipe; did you mean mnist_mlp?\n"


def test_the_list_says_what_each_recipe_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _shardlaunch(monkeypatch, "recipes") == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{text}" for name in RECIPES)
    assert "Train a convolutional net on CIFAR-10" in text
    assert "presets: demo, modern" in text
    assert _shardlaunch(monkeypatch, "recipes", "--", "--preset") == EXIT_USER_ERROR


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["run", "nosuch"], ["parity", "nosuch"], ["predict", "--help"]], ids=str
)
def test_help_and_refusals_do_not_import_torch(words: list[str]) -> None:
    code = f"""
import contextlib, io, runpy, sys
sys.argv = ["shardlaunch", *{words!r}]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        runpy.run_module("shardlaunch", run_name="__main__")
"""
    packages = imported(code)
    assert "shardlaunch" in packages
    assert "torch" not in packages

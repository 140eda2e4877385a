"""What --help prints."""

import re
from dataclasses import dataclass
from typing import Any

import pytest

from shardlaunch import Options, option
from shardlaunch.launcher.command_line.help import grouped, help_texts
from shardlaunch.launcher.command_line.parsing import parse_options
from shardlaunch.launcher.options import GROUPS


@dataclass(kw_only=True)
class _Base(Options):
    zoom: float = option(2.0, group="image")
    """Zoom in."""


@dataclass(kw_only=True)
class _Options(_Base):
    depth: int = 3
    """Layers
    of the net."""
    bare: tuple[str, ...] = ()
    epochs: int = 4
    zoom: float = 1.0
    clip: bool = option(False, group="optimization")
    """Clip more."""


def _help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    presets: dict[str, dict[str, Any]] = {"deep": {"depth": 99}}
    with pytest.raises(SystemExit) as caught:
        parse_options(_Options, presets, argv, program="mine.py", description="Train mine.")
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_recipes_own_options_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    headings = re.findall(r"^\W*(\w+) options\W*$", _help(capsys, "--help"), re.M)
    assert headings == ["mine", "image", *GROUPS]


def test_each_option_stands_under_one_heading() -> None:
    groups = grouped(_Options, own="mine")
    assert groups["mine"] == ["depth", "bare"]
    assert groups["image"] == ["zoom"]
    assert groups["optimization"][-2:] == ["leave_out", "clip"]
    assert "epochs" in groups["run"]
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(_Options.__dataclass_fields__)


def test_texts_are_those_below_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_texts(_Options)["depth"] == "Layers of the net."
    assert help_texts(_Options)["zoom"] == "Zoom in."
    assert all(name in help_texts(Options) for name in Options.__dataclass_fields__)
    text = _help(capsys, "-h")
    assert "Train mine." in text
    assert "Presets (--preset): deep" in text
    assert re.search(r"--depth INT +Layers of the net. \(default: 3\)", text)
    assert re.search(r"--epochs INT .*\(default:.*4\)", text, re.S)


def test_defaults_are_those_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(default: 99)" in _help(capsys, "--preset", "deep", "--help")

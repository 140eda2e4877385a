"""Versions: made-up lists of what is installed."""

import pytest

from shardlaunch.launcher.commands.doctor import versions
from tests.unit.launcher.commands.doctor.levels import fine, only, said

REQUIRES = ["torch>=2.13", "datasets>=5.2", "scikit-learn>=1.7", 'deepspeed>=0.19.8; extra == "deepspeed"']
INSTALLED = {"torch": "2.13.0+cpu", "datasets": "5.2.0", "scikit-learn": "1.7.2"}


def test_python() -> None:
    fine(versions.check_python((3, 11, 7), ">=3.11"))
    only(versions.check_python((3, 10, 1), ">=3.11"), "problem", "Python 3.10.1; shardlaunch needs >=3.11")


@pytest.mark.parametrize(
    ("others", "part"),
    [
        ({"datasets": "5.0.0"}, 'pip install "datasets>=5.2"'),  # which restarts a stream at the second resume
        ({"torch": "2.12.1+cu128"}, "torch 2.12.1+cu128, but >=2.13 is needed"),
        ({"deepspeed": "0.18.0"}, "deepspeed 0.18.0, but >=0.19.8 is needed"),
    ],
)
def test_packages_that_are_too_old(others: dict[str, str], part: str) -> None:
    only(versions.check_requirements(REQUIRES, {**INSTALLED, **others}), "problem", part)


def test_packages_that_are_missing_or_right() -> None:
    fine(versions.check_requirements(REQUIRES, INSTALLED))
    fine(versions.check_requirements(REQUIRES, {**INSTALLED, "torch": "2.14.0.dev20261101+cu130"}))
    without = {name: version for name, version in INSTALLED.items() if name != "scikit-learn"}
    only(versions.check_requirements(REQUIRES, without), "problem", "scikit-learn is not installed")


@pytest.mark.parametrize(
    ("others", "level", "part"),
    [
        ({"torchvision": "0.27.0"}, "problem", "builds for different devices"),
        ({"torchvision": "0.26.0+cpu"}, "problem", "is compiled for torch==2.12.0, and torch is 2.13.0+cpu"),
        ({"deepspeed": "0.20.0"}, "note", "known for 0.19.8"),
    ],
)
def test_packages_that_do_not_go_together(others: dict[str, str], level: str, part: str) -> None:
    torch = "2.12.0" if others.get("torchvision", "").startswith("0.26") else "2.13.0"
    only(versions.check_pairs({**INSTALLED, **others}, lambda name: ["numpy", f"torch=={torch}"]), level, part)


def test_packages_that_go_together() -> None:
    installed = {**INSTALLED, "torchvision": "0.27.0+cpu", "deepspeed": "0.19.8"}
    fine(versions.check_pairs(installed, lambda name: ["torch==2.13.0"]))


def test_a_package_that_is_there_twice() -> None:
    fine(versions.check_copies(["a", "b"]))
    only(versions.check_copies(["a", "b", "a"]), "problem", "pip install --force-reinstall a")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    fine(versions.check_compiler("--compile"))
    monkeypatch.setattr(versions, "which", lambda name: None)
    only(versions.check_compiler("--compile"), "problem", "--compile compiles C++, and there is no compiler")


def test_what_is_installed_here() -> None:
    assert "torch " in said(versions.check_versions(), "ok")

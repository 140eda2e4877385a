"""What each entry point imports, checked in new processes, because this one has imported everything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# That take long to import and are not needed before a run begins.
HEAVY = {"accelerate", "datasets", "deepspeed", "tensorboard", "torchmetrics", "transformers"}
RECIPES = sorted(
    path.stem for path in (Path(__file__).resolve().parents[3] / "recipes").glob("*.py") if path.stem != "__init__"
)


def imported(code: str) -> set[str]:
    """Return the packages that some code has imported at its end."""
    report = "import sys, json; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_the_public_names_need_no_heavy_library() -> None:
    packages = imported("from shardlaunch import *")
    assert not packages & HEAVY
    assert "torch" in packages


def test_the_package_itself_and_its_errors_do_not_need_torch() -> None:
    assert "torch" not in imported("import shardlaunch; shardlaunch.UserError")


@pytest.mark.parametrize("topic", ["data", "orders", "images", "sounds", "text", "metrics", "demo"])
def test_topic_modules_need_no_heavy_library(topic: str) -> None:
    assert not imported(f"import shardlaunch.{topic}") & HEAVY


def test_recipe_files_need_no_heavy_library() -> None:
    assert len(RECIPES) == 13
    assert not imported(f"from shardlaunch.recipes import {', '.join(RECIPES)}") & HEAVY


def test_classes_of_metrics_are_there_when_they_are_asked_for() -> None:
    assert "torchmetrics" in imported("from shardlaunch.metrics import BitsPer, Perplexity")


def test_only_a_sweep_imports_optuna() -> None:
    modules = "from shardlaunch.launcher.commands import main, start, sweep; from shardlaunch.launcher.runs import fit"
    assert not imported(modules) & {"optuna", "sqlalchemy", "alembic"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    import shardlaunch
    import shardlaunch.metrics

    for module in (shardlaunch, shardlaunch.metrics):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018

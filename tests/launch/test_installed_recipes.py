"""Installed recipes by name, as a person types it."""

from pathlib import Path

from tests.launch.command import PYTHON, end_of, environment


def test_a_recipe_runs_by_name(tmp_path: Path) -> None:
    options = ("--preset", "demo", "--max-steps", "1", "--tracker", "none", "--output-dir", str(tmp_path / "run"))
    words = (*PYTHON, "-m", "shardlaunch", "run", "mnist_mlp", "--", *options)
    ended = end_of(words, environment(tmp_path / "hf"))
    assert ended.status == 0, ended.both
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").is_file()

"""K-fold cross-validation: each fold a run, resumable, the same on any number of ranks."""

import json
import re
from pathlib import Path

import pytest
import torch

from shardlaunch.launcher.folds import fold_of_samples
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NetRecipe, run_quietly, run_well, training_lines

ARGV = ["--folds", "3", "--max-steps", "4", "--threads-per-rank", "1"]


def _run(num_ranks: int, output_dir: Path, *options: str) -> str:
    output: str = run_on_ranks(num_ranks, run_well, NetRecipe, [*ARGV, "--output-dir", str(output_dir), *options])[0]
    return output


def test_folds_resume_and_are_the_same_on_two_ranks(tmp_path: Path) -> None:
    output = _run(1, tmp_path / "one")
    assert re.search(r"^fold +2 of 3$", output, re.M)
    assert "mean of 3 folds" in output
    record = json.loads((tmp_path / "one" / "folds.json").read_text())
    lines = [training_lines(tmp_path / "one" / f"fold-{number}") for number in (1, 2, 3)]
    last = [line for fold in lines for line in fold if "eval/accuracy" in line]
    assert [fold["eval/accuracy"] for fold in record["folds"]] == [line["eval/accuracy"] for line in last]
    mean = sum(line["eval/accuracy"] for line in last) / 3
    assert record["summary"]["eval/accuracy"]["mean"] == pytest.approx(mean)

    assert "0 of 3 folds are complete; the same command goes on" in _run(2, tmp_path / "two", "--stop-at-step", "2")
    assert not (tmp_path / "two" / "folds.json").exists()
    assert "this run is complete" not in _run(2, tmp_path / "two")
    assert _run(2, tmp_path / "two").count("this run is complete") == 3
    other = json.loads((tmp_path / "two" / "folds.json").read_text())
    for name, found in record["summary"].items():
        assert other["summary"][name] == pytest.approx(found, abs=1e-6)


def test_a_fold_is_evaluated_on_what_it_was_not_trained_on(tmp_path: Path) -> None:
    """The last part of the training data is another for each fold, and all of it is held out in some."""
    _run(1, tmp_path)
    recipe = NetRecipe(NetRecipe.__annotations__["options"]())
    train = recipe.datasets()["train"]
    folds = fold_of_samples(len(train), 3, seed=0, classes=recipe.classes_of(train))
    samples = [
        sum(line["samples"] for line in training_lines(tmp_path / f"fold-{number}") if "samples" in line)
        for number in (1, 2, 3)
    ]
    assert samples == [4 * 32] * 3
    assert sorted(torch.from_numpy(folds).bincount().tolist()) == [67, 68, 68]
    fingerprints = {
        json.loads((tmp_path / f"fold-{number}" / "run.json").read_text())["identity"]["fingerprint of the eval data"]
        for number in (1, 2, 3)
    }
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--folds", "204"), "--folds 204: the training data has only 203 samples"),
    ],
    ids=str,
)
def test_bad_folds(options: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    status, output = run_quietly(NetRecipe, [*ARGV, *options, "--output-dir", str(tmp_path)])
    assert status == 2
    assert complaint in output


def test_folds_do_not_mix_with_a_run_of_another_kind(tmp_path: Path) -> None:
    run_well(NetRecipe, ["--max-steps", "1", "--output-dir", str(tmp_path)])
    status, output = run_quietly(NetRecipe, [*ARGV, "--output-dir", str(tmp_path)])
    assert status == 2
    assert "holds a run without --folds" in output

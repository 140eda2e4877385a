"""K-fold cross-validation: each fold is a resumable run, the same on any number of ranks."""

import json
import re
from pathlib import Path

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.recipes import NetRecipe, run_quietly, run_well, training_lines

ARGV = ["--folds", "3", "--max-steps", "4", "--threads-per-rank", "1", "--ema", "0.3"]


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
    assert "eval_ema/accuracy" in record["summary"]

    records = [json.loads((tmp_path / "one" / f"fold-{number}" / "run.json").read_text()) for number in (1, 2, 3)]
    assert len({record["identity"]["fingerprint of the eval data"] for record in records}) == 3

    assert "0 of 3 folds are complete; the same command without --stop-at-step" in _run(
        2, tmp_path / "two", "--stop-at-step", "2"
    )
    assert not (tmp_path / "two" / "folds.json").exists()
    assert "this run is complete" not in _run(2, tmp_path / "two")
    assert _run(2, tmp_path / "two").count("this run is complete") == 3
    other = json.loads((tmp_path / "two" / "folds.json").read_text())
    for name, found in record["summary"].items():
        assert other["summary"][name] == pytest.approx(found, abs=1e-6)


def test_more_folds_than_samples(tmp_path: Path) -> None:
    status, output = run_quietly(NetRecipe, [*ARGV, "--folds", "204", "--output-dir", str(tmp_path)])
    assert status == 2
    assert "--folds 204: the training data has only 203 samples" in output


def test_folds_do_not_mix_with_a_run_of_another_kind(tmp_path: Path) -> None:
    run_well(NetRecipe, ["--max-steps", "1", "--output-dir", str(tmp_path)])
    status, output = run_quietly(NetRecipe, [*ARGV, "--output-dir", str(tmp_path)])
    assert status == 2
    assert "holds a run without --folds" in output

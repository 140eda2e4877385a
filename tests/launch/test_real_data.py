"""The recipes on real data reach what the README says."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from tests.launch.command import BERT, MNIST, SHARDLAUNCH, end_of, environment


@pytest.fixture(scope="module")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


def _last_evaluation(output_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/accuracy" in line][-1]


def test_the_demo(hf_home: Path, tmp_path: Path) -> None:
    """What `make demo` runs: films that the model has not seen, two ranks, and the same command again."""
    words = (*SHARDLAUNCH, "run", BERT, "--ranks", "2", "--", "--preset", "demo", "--output-dir", str(tmp_path))
    ended = end_of(words, environment(hf_home), stuck_s=1200)
    assert ended.status == 0, ended.both
    assert ended.err == ""
    assert _last_evaluation(tmp_path)["eval/accuracy"] >= 0.80
    newest = max((tmp_path / "checkpoints").iterdir())
    model = AutoModelForSequenceClassification.from_pretrained(newest)
    assert model.config.id2label == {0: "rotten", 1: "fresh"}
    again = end_of(words, environment(hf_home))
    assert again.status == 0, again.both
    assert "this run is complete" in again.out


def test_mnist(data_dir: Path, hf_home: Path, tmp_path: Path) -> None:
    words = (*SHARDLAUNCH, "run", MNIST, "--", "--data", str(data_dir / "mnist"), "--output-dir", str(tmp_path))
    ended = end_of(words, environment(hf_home), stuck_s=1200)
    assert ended.status == 0, ended.both
    last = _last_evaluation(tmp_path)
    assert last["epoch"] == 10
    assert last["eval/accuracy"] >= 0.97
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["identity"]["number of steps (--epochs, --max-steps)"] == 9380


def test_imdb(data_dir: Path, hf_home: Path, tmp_path: Path) -> None:
    """A few steps on the full reviews: they are found, tokenised once, batched by length and trained on."""
    options = ("--preset", "demo", "--data", str(data_dir / "imdb"), "--max-length", "64", "--stop-at-step", "4")
    ended = end_of(
        (
            *SHARDLAUNCH,
            "run",
            BERT,
            "--ranks",
            "2",
            "--",
            *options,
            "--output-dir",
            str(tmp_path),
            "--eval-every",
            "1000",
        ),
        environment(hf_home),
        stuck_s=1200,
    )
    assert ended.status == 0, ended.both
    assert "25,000 samples" in ended.out

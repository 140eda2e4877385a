"""The recipes reach the README's results on real data."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from tests.launch.command import BERT, MNIST, RECIPES, SHARDLAUNCH, end_of, environment


@pytest.fixture(scope="module")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


def _last_evaluation(output_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/accuracy" in line][-1]


def test_the_demo(hf_home: Path, tmp_path: Path) -> None:
    """What `make demo` runs: held-out films, two ranks, and the same command again."""
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
    assert last["eval/accuracy"] >= 0.975
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["identity"]["number of steps (--epochs, --max-steps)"] == 9380


@pytest.mark.parametrize(
    ("recipe", "data", "options", "samples"),
    [
        ("bert_imdb", "imdb", ("--preset", "demo", "--max-length", "64"), "25,000 samples"),
        ("cifar_cnn", "cifar10", ("--preset", "modern", "--width", "4"), "50,000 samples"),
        ("vgg16_transfer", "cifar10", ("--preset", "small", "--width", "0.1"), "50,000 samples"),
        ("gpt_lm", "tinyshakespeare/input.txt", ("--preset", "characters"), "3,922 samples"),
        (
            "translate_seq2seq",
            "multi30k",
            ("--eval-split", "test", "--num-beams", "1", "--max-target-length", "24"),
            "29,000 samples",
        ),
    ],
)
def test_a_few_steps_on_full_data(
    recipe: str, data: str, options: tuple[str, ...], samples: str, data_dir: Path, hf_home: Path, tmp_path: Path
) -> None:
    """The data is found, read, batched and trained on."""
    words = (*SHARDLAUNCH, "run", str(RECIPES / f"{recipe}.py"), "--ranks", "2", "--", *options)
    steps = ("--stop-at-step", "4", "--eval-every", "1000", "--data", str(data_dir / data))
    ended = end_of((*words, *steps, "--output-dir", str(tmp_path)), environment(hf_home), stuck_s=1200)
    assert ended.status == 0, ended.both
    assert samples in ended.out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4

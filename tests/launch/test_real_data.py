"""The recipes reach the README's results on real data."""

import json
from pathlib import Path

import pytest

from tests.launch.checks import last_evaluation
from tests.launch.command import MNIST, PYTHON, RECIPES, environment, forked_end_of


def test_mnist(data_dir: Path, hf_home: Path, tmp_path: Path) -> None:
    """Three of the ten epochs of the README's figure."""
    options = ("--epochs", "3", "--threads-per-rank", "1", "--output-dir", str(tmp_path))
    ended = forked_end_of((*PYTHON, MNIST, "--data", str(data_dir / "mnist"), *options), environment(hf_home))
    assert ended.status == 0, ended.both
    last = last_evaluation(tmp_path)
    assert last["epoch"] == 3
    assert last["eval/accuracy"] >= 0.95  # 0.956 to 0.966 with the first three seeds
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["identity"]["number of steps (--epochs, --max-steps)"] == 2814


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
    words = (*PYTHON, str(RECIPES / f"{recipe}.py"), "--data", str(data_dir / data), *options)
    steps = ("--stop-at-step", "4", "--eval-every", "1000", "--output-dir", str(tmp_path))
    ended = forked_end_of((*words, *steps), environment(hf_home), num_ranks=2)
    assert ended.status == 0, ended.both
    assert samples in ended.out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4

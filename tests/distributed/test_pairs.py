"""Embeddings of pairs: negatives are those of the whole global batch, scores are those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from shardlaunch.launcher.toolkit.retrieval_metrics import retrieval_metrics
from shardlaunch.launcher.toolkit.text_pairs import pooled
from shardlaunch.recipes.embed_pairs import EmbedPairs
from tests.recipes import losses, run_quietly, run_well, save_small_bert, training_lines

WORDS = ["film", "war", "love", "dog", "king", "night", "house", "road"]
ARGV = ["--max-steps", "3", "--global-batch-size", "12", "--tracker", "none", "--threads-per-rank", "1"]
ARGV += ["--micro-batch-size", "4", "--order", "sequential"]  # not by length, as micro-batches of another size are
COLUMNS = ["--anchor-column", "anchor", "--positive-column", "positive", "--max-length", "12", "--lr", "0.001"]


def rows(count: int) -> list[dict[str, str]]:
    return [
        {
            "anchor": f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}",
            "positive": f"the {WORDS[i % 8]} of {WORDS[i // 8 % 8]}",  # repeats after 64 rows
            "negative": f"no {WORDS[(i + 3) % 8]} {i}",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bert"
    save_small_bert(folder)
    config = json.loads((folder / "config.json").read_text())
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # drawn per micro-batch
    (folder / "config.json").write_text(json.dumps({**config, **without}))
    return folder


def _write(folder: Path, train: list[Any], held_out: list[Any]) -> Path:
    folder.mkdir()
    for name, data in (("train", train), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return folder


def test_the_size_of_micro_batches_changes_nothing(model: Path, tmp_path: Path) -> None:
    """All pairs of the global batch are negatives, however it is divided; the scores are those of transformers."""
    data = _write(tmp_path / "data", rows(80), rows(20))
    argv = [*ARGV, *COLUMNS, "--model", str(model), "--data", str(data), "--negative-column", "negative"]
    found = {}
    for size in ("12", "4"):
        run = tmp_path / size
        output = run_well(EmbedPairs, [*argv, "--micro-batch-size", size, "--output-dir", str(run)])
        found[size] = losses(run)
    assert max(abs(found["12"][step] - found["4"][step]) for step in (1, 2, 3)) < 1e-5
    assert abs(found["4"][1] - found["4"][3]) > 1e-3
    assert "16 of 80 texts 'positive' of the train data repeat another" in " ".join(output.split())
    last = [line for line in training_lines(tmp_path / "4") if "eval/loss" in line][-1]
    checkpoint = max((tmp_path / "4" / "checkpoints").iterdir())
    loaded, info = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts, vectors = [], []
    for row in rows(20):
        with torch.no_grad():
            inputs = [tokenizer(row[role], return_tensors="pt") for role in ("anchor", "positive", "negative")]
            states = [loaded.eval()(**one).last_hidden_state for one in inputs]
        pairs = zip(states, inputs, strict=True)
        vectors.append(torch.cat([pooled(one, its["attention_mask"], pooling="mean") for one, its in pairs]))
        texts.append([hash(row[role]) for role in ("anchor", "positive", "negative")])
    for name, metric in retrieval_metrics().items():
        metric.update(torch.tensor(texts), torch.stack(vectors).unbind(dim=1))
        assert last[f"eval/{name}"] == pytest.approx(metric.compute().item(), abs=1e-6), name


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({"anchor": " "}, (), "row 3 of the train data has an empty 'anchor'; remove it"),
        ({"anchor": None}, (), "is without a 'anchor'"),
        ({}, ("--positive-column", "anchor"), "--anchor-column and --positive-column: must be different columns"),
        ({}, ("--negative-column", "other"), "the train data has no column 'other'"),
        ({}, ("--max-length", "2"), "--max-length 2: must be at least 3"),
    ],
)
def test_bad_pairs(change: Any, options: tuple[str, ...], complaint: str, model: Path, tmp_path: Path) -> None:
    train = rows(12)
    train[2] = {**train[2], **change}
    data = _write(tmp_path / "data", train, rows(4))
    argv = [*ARGV, *COLUMNS, "--model", str(model), "--data", str(data), *options]
    status, output = run_quietly(EmbedPairs, [*argv, "--output-dir", str(tmp_path / "run")])
    assert (status, complaint in " ".join(output.split())) == (2, True), output

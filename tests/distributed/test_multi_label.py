"""Several labels per text: losses and scores are those of transformers and scikit-learn."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shardlaunch.launcher.commands.predict import predict_texts
from shardlaunch.launcher.commands.predict_file import predict_rows
from shardlaunch.recipes.bert_imdb import BertImdb
from tests.recipes import final_tensors, run_quietly, run_well, save_small_bert, training_lines

ARGV = ["--task", "multi-label", "--global-batch-size", "8", "--micro-batch-size", "4", "--tracker", "none"]
NAMES = ["drama", "long", "western"]


def rows(count: int) -> list[dict[str, Any]]:
    """Return texts with none to three labels."""
    found = []
    for number in range(count):
        labels = [name for place, name in enumerate(NAMES) if number >> place & 1]
        words = ["film", *labels, *("good " * (number % 4)).split()]
        found.append({"text": " ".join(words), "label": labels[::-1]})
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bert"
    save_small_bert(folder)
    return folder


def _write(folder: Path, kind: str) -> list[str]:
    """Write the rows as lists, as texts in CSV files, or with a column per label; return the options for it."""
    folder.mkdir()
    for name, count in (("train", 48), ("test", 12)):
        data = rows(count)
        if kind == "lists":
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        elif kind == "texts":
            texts = [{"text": row["text"], "label": " ; ".join(row["label"])} for row in data]
            pd.DataFrame(texts).to_csv(folder / f"{name}.csv", index=False)
        else:
            columns = [{"text": row["text"], **{label: int(label in row["label"]) for label in NAMES}} for row in data]
            pd.DataFrame(columns).to_csv(folder / f"{name}.csv", index=False)
    return {"lists": [], "texts": ["--label-separator", ";"], "columns": ["--label-columns", *NAMES]}[kind]


def test_losses_and_scores(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, lines = {}, {}
    for kind in ("lists", "texts", "columns"):
        options = [*_write(tmp_path / kind, kind), "--epochs", "2", "--lr", "0.003", "--max-length", "12"]
        metrics = ["--metrics", "f1_macro", "f1_micro", "exact_match", "f1_per_label"]
        data = ["--model", str(model), "--data", str(tmp_path / kind), "--output-dir", str(tmp_path / f"{kind}-run")]
        run_well(BertImdb, [*ARGV, *data, *options, *metrics])
        tensors[kind] = final_tensors(tmp_path / f"{kind}-run")
        lines[kind] = [line for line in training_lines(tmp_path / f"{kind}-run") if "eval/loss" in line][-1]
    assert lines["lists"] == lines["texts"] == lines["columns"]
    assert all(torch.equal(tensors["lists"][name], tensors["columns"][name]) for name in tensors["lists"])
    last, checkpoint = lines["lists"], max((tmp_path / "lists-run" / "checkpoints").iterdir())
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    assert loaded.config.problem_type == "multi_label_classification"
    assert loaded.config.id2label == dict(enumerate(NAMES))
    tokenizer, held_out = AutoTokenizer.from_pretrained(checkpoint), rows(12)
    with torch.no_grad():
        logits = torch.cat([loaded(**tokenizer(row["text"], return_tensors="pt")).logits for row in held_out])
    wanted = torch.tensor([[float(name in row["label"]) for name in NAMES] for row in held_out])
    assert last["eval/loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, wanted).item(), abs=1e-5)
    found = (logits > 0).int()
    for average in ("macro", "micro"):
        score = f1_score(wanted.int(), found, average=average, zero_division=0)
        assert last[f"eval/f1_{average}"] == pytest.approx(score)
        assert score > 0.05
    assert last["eval/f1_per_label"] == pytest.approx(f1_score(wanted, found, average=None, zero_division=0).tolist())
    assert last["eval/exact_match"] == pytest.approx((wanted == found).all(dim=1).float().mean().item())
    capsys.readouterr()
    predict_texts(checkpoint, texts=[row["text"] for row in held_out], file=None)
    for line, row in zip(capsys.readouterr().out.splitlines(), found.tolist(), strict=True):
        assert line.split("\t")[0] == (", ".join(name for name, one in zip(NAMES, row, strict=True) if one) or "-")
    predict_rows(
        checkpoint, data=str(tmp_path / "lists/test.jsonl"), text_column="", output=tmp_path / "o.jsonl", ema=False
    )
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [[int(name in row["predicted_label"]) for name in NAMES] for row in written] == found.tolist()


@pytest.mark.parametrize(
    ("train", "held_out", "options", "complaint"),
    [
        ([["a"], ["b"]], [["c"]], (), "row 1 of the eval data has the label 'c', which the training data has not"),
        ([["a"], ["a", "a"]], [["a"]], (), "the training data has 'a' in column 'label'; at least two are required"),
        (["a;b", "b"], ["a"], (), "row 1 of the train data: 'label' is a text; say what is between labels"),
        ([["a"], ["b"]], [["a"]], ("--label-separator", ";"), "'label' is not a text, so that --label-separator"),
        ([["a"], ["b"]], [[1]], (), "column 'label' has names in some rows and numbers in others"),
        ([["a"], None], [["a"]], (), "row 2 of the train data: 'label' is not a list of labels, but None"),
        ([1, 2], [1], ("--label-columns", "label", "more"), "--label-columns more: --data"),
        ([1, 2], [1], ("--label-columns", "label", "text2"), "row 2 of the train data has 2 for 'label'; it must be 0"),
        ([["a"], ["b"]], [["a"]], ("--class-weights", "balanced"), "--class-weights: only for --task classification"),
        ([["a"], ["b"]], [["a"]], ("--metrics", "accuracy"), "unknown metric 'accuracy'; available: f1_micro"),
        ([["a"], ["b"]], [["a"]], ("--metrics", "f1_per_label"), "is not a single number to choose the best by"),
        ([0, 1], [1], ("--task", "classification", "--label-separator", ";"), "only for --task multi-label"),
    ],
)
def test_bad_labels(
    train: Any, held_out: Any, options: tuple[str, ...], complaint: str, model: Path, tmp_path: Path
) -> None:
    for name, labels in (("train", train), ("test", held_out)):
        lines = (json.dumps({"text": "a film", "label": label, "text2": 0}) + "\n" for label in labels)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    argv = [*ARGV, "--model", str(model), "--data", str(tmp_path), "--max-steps", "1", "--max-length", "8", *options]
    status, output = run_quietly(BertImdb, [*argv, "--output-dir", str(tmp_path / "run")])
    assert (status, complaint in " ".join(output.split())) == (2, True), output

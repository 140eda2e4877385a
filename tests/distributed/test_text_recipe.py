"""The text recipe beyond its demo: other encoders, columns, tasks, class weights."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from shardlaunch import UserError
from shardlaunch.data import class_weights
from shardlaunch.launcher.commands.predict import predict_texts
from shardlaunch.launcher.toolkit.demo_data import bert_dir
from shardlaunch.recipes.bert_imdb import BertImdb, BertOptions
from tests.recipes import run_quietly, run_well, training_lines

ARGV = ["--max-steps", "3", "--global-batch-size", "8", "--micro-batch-size", "4", "--tracker", "none"]
MAX_LENGTH = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small encoders with random weights and the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(bert_dir())
    sizes = {"vocab_size": len(tokenizer), "num_attention_heads": 2, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = {**sizes, "hidden_size": 16, "intermediate_size": 16}
        # Of the positions, RoBERTa leaves out those up to the padding's.
        roberta = RobertaModel(RobertaConfig(**wide, max_position_embeddings=MAX_LENGTH + 2, pad_token_id=1))
        roberta.save_pretrained(folder / "roberta")
        distilbert = DistilBertConfig(
            vocab_size=len(tokenizer), dim=16, hidden_dim=16, n_heads=2, n_layers=1, max_position_embeddings=MAX_LENGTH
        )
        DistilBertModel(distilbert).save_pretrained(folder / "distilbert")
    for model in ("roberta", "distilbert"):
        tokenizer.save_pretrained(folder / model)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a CSV of reviews with three classes of opinion and a mark."""
    kinds = ["good", "bad", "good", "fair", "good", "good", "bad", "good"]
    rows = [{"review": f"film {i} is {kind}", "opinion": kind, "mark": i / 10} for i, kind in enumerate(kinds * 5)]
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def _argv(model: Path, data: Path, output_dir: Path, *options: str) -> list[str]:
    columns = ["--data", str(data), "--text-column", "review", "--label-column", "opinion"]
    length = ["--max-length", str(MAX_LENGTH), "--output-dir", str(output_dir)]
    return [*ARGV, "--model", str(model), *columns, *length, *options]


def _last(output_dir: Path) -> dict[str, Any]:
    return [line for line in training_lines(output_dir) if "eval/loss" in line][-1]


@pytest.mark.parametrize("model", ["roberta", "distilbert"])
def test_other_encoders_of_several_classes(model: str, models: Path, reviews: Path, tmp_path: Path) -> None:
    metrics = ("--metrics", "f1_macro", "confusion_matrix", "--class-weights", "balanced")
    output = run_well(BertImdb, _argv(models / model, reviews, tmp_path, *metrics))
    assert "best   f1_macro" in output
    last = _last(tmp_path)
    assert {"eval/f1_macro", "eval/confusion_matrix"} <= last.keys()
    assert sum(map(sum, last["eval/confusion_matrix"])) == 4
    trained = AutoModelForSequenceClassification.from_pretrained(max((tmp_path / "checkpoints").iterdir()))
    assert trained.config.id2label == {0: "bad", 1: "fair", 2: "good"}


def test_a_head_is_kept_for_the_same_classes_only(models: Path, reviews: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(models / "distilbert", id2label={0: "bad", 1: "fair", 2: "good"})
    for names in (["bad", "fair", "good"], ["good", "fair", "bad"]):
        folder = tmp_path / names[0]
        shutil.copytree(models / "distilbert", folder)
        config.id2label = dict(enumerate(names))
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    new = {}
    for folder in (tmp_path / "bad", tmp_path / "good"):
        output = run_well(BertImdb, _argv(folder, reviews, tmp_path / "runs" / folder.name))
        (new[folder.name],) = re.findall(r"(\d+) of \d+ tensors newly initialized", output) or ["0"]
    assert new == {"bad": "0", "good": "2"}, "the output layer"


def test_regression(models: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--task", "regression", "--label-column", "mark", "--lr", "0.01")
    run_well(BertImdb, _argv(models / "distilbert", reviews, tmp_path, *options))
    last = _last(tmp_path)
    assert last["eval/mse"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert "eval/r2" in last
    step_dir = max((tmp_path / "checkpoints").iterdir())
    config = json.loads((step_dir / "config.json").read_text())
    text, value = "a film", AutoModelForSequenceClassification.from_pretrained(step_dir)
    predict_texts(tmp_path, texts=[text], file=None)
    tokens = AutoTokenizer.from_pretrained(step_dir)(text, return_tensors="pt", return_token_type_ids=False)
    assert capsys.readouterr().out == f"{value(**tokens).logits.item():.4f}\t{text}\n"
    assert (config["problem_type"], AutoModelForSequenceClassification.from_pretrained(step_dir).num_labels) == (
        "regression",
        1,
    )


def test_a_classifier_from_a_regression(models: Path, reviews: Path, tmp_path: Path) -> None:
    """The exported config matches the new task. The regression had large integers and batches of one sample."""
    pd.DataFrame({"review": [f"film {i}" for i in range(20)], "opinion": [2**24 + 1 + i for i in range(20)]}).to_csv(
        tmp_path / "marks.csv"
    )
    one_by_one = ("--global-batch-size", "1", "--micro-batch-size", "1")
    options = ("--task", "regression", "--lr", "1e-9", *one_by_one)
    run_well(BertImdb, _argv(models / "distilbert", tmp_path / "marks.csv", tmp_path / "first", *options))
    first = max((tmp_path / "first" / "checkpoints").iterdir())
    run_well(BertImdb, _argv(first, reviews, tmp_path / "second"))
    config = json.loads((max((tmp_path / "second" / "checkpoints").iterdir()) / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"


def test_another_metric_starts_the_search_for_the_best_anew(models: Path, reviews: Path, tmp_path: Path) -> None:
    argv = _argv(models / "distilbert", reviews, tmp_path, "--eval-every", "1")
    run_well(BertImdb, [*argv, "--metrics", "accuracy", "--stop-at-step", "2"])
    output = run_well(BertImdb, [*argv, "--metrics", "f1_macro"])
    assert f"best   f1_macro {_last(tmp_path)['eval/f1_macro']:.4f} at step 3" in output


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ({"train": [0] * 8, "test": [0] * 2}, "at least two classes are required"),
        ({"train": [0, 1] * 4, "test": ["0", "one"]}, "the classes differ: column 'opinion' is"),
        ({"train": [True, False] * 4, "test": [True, False]}, ""),
    ],
    ids=["one class", "other type", "truth values"],
)
def test_odd_classes(labels: dict[str, list[Any]], complaint: str, models: Path, tmp_path: Path) -> None:
    for name, its_labels in labels.items():
        rows = {"review": [f"film {i}" for i in range(len(its_labels))], "opinion": its_labels}
        pd.DataFrame(rows).to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    status, output = run_quietly(BertImdb, _argv(models / "distilbert", tmp_path, tmp_path / "run"))
    assert (status, complaint in output) == (2 if complaint else 0, True), output


def test_weights_of_classes() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2]).numpy()
    balanced = class_weights(("balanced",), labels, ["a", "b", "c"])
    assert balanced is not None
    assert balanced.tolist() == pytest.approx([6 / 9, 2.0, 1.0])
    assert balanced[labels].mean().item() == pytest.approx(1.0)
    given = class_weights(("1", "0.5", "0"), labels, ["a", "b", "c"])
    assert given is not None
    assert given.tolist() == [1.0, 0.5, 0.0]
    assert class_weights((), labels, ["a", "b", "c"]) is None


@pytest.mark.parametrize(
    ("options", "complaints"),
    [
        (("--text-column", "text"), ("no column 'text'", "it has 'review', 'opinion', 'mark'", "--text-column NAME")),
        (("--label-column", "review"), ("--text-column and --label-column: must be different columns",)),
        (("--task", "regression"), ("row 1 has 'good' for 'opinion', which is not a number",)),
        (("--class-weights", "1", "2"), ("--class-weights 1 2: must be balanced, or 3 numbers", "'bad', 'fair'")),
        (("--metrics", "f3"), ("unknown metric 'f3'",)),
        (("--max-length", "2"), ("--max-length 2: must be at least 3",)),
        (("--warmup-steps", "3"), ("--warmup-steps 3: must be less than the run's 3 steps",)),
        (("--max-length", "17"), ("--max-length 17: this model takes at most 16 tokens",)),
        (("--freeze", "encoder.*"), ("--freeze: no parameter matches encoder.*", "roberta.embeddings")),
        (("--optimizer", "sgdm"), ("--optimizer sgdm: unknown",)),
    ],
    ids=str,
)
def test_bad_input(
    options: tuple[str, ...], complaints: tuple[str, ...], models: Path, reviews: Path, tmp_path: Path
) -> None:
    status, output = run_quietly(BertImdb, _argv(models / "roberta", reviews, tmp_path, *options))
    assert status == 2, output
    assert all(complaint in output for complaint in complaints), output
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_model_whose_weights_are_a_pickle(models: Path, reviews: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "distilbert", tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    status, output = run_quietly(BertImdb, _argv(tmp_path / "old", reviews, tmp_path / "run"))
    assert status == 2
    assert "its weights are a pickle file" in output


def test_a_metric_that_cannot_say_which_is_best() -> None:
    with pytest.raises(UserError, match=r"--metrics confusion_matrix: .* put another metric first"):
        BertOptions(metrics=("confusion_matrix", "accuracy"))

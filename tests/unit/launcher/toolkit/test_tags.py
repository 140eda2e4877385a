"""Tags of words: entities as seqeval counts them, CoNLL files, words as tokens."""

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from transformers import AutoTokenizer

from shardlaunch import UserError
from shardlaunch.launcher.toolkit.conll_files import conll_table
from shardlaunch.launcher.toolkit.demo_data import bert_dir
from shardlaunch.launcher.toolkit.tag_metrics import tag_metrics
from shardlaunch.launcher.toolkit.tags import entities, numbered_tags, split_tag, tagged_tokens

CALLED = {"words": "tokens", "tags": "tags"}


def _sentences(tags: list[str], count: int) -> list[list[str]]:
    draw = random.Random(0)
    return [[draw.choice(tags) for _ in range(draw.randint(1, 9))] for _ in range(count)]


@pytest.mark.parametrize("prefixes", ["BI", "BIES"])
def test_entities_are_those_of_seqeval(prefixes: str) -> None:
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("PER", "LOC-X"))]
    for sentence in _sentences(tags, 3000):
        assert entities([split_tag(tag) for tag in sentence]) == set(get_entities(sentence)), sentence


def test_other_names_of_prefixes() -> None:
    assert split_tag("U-PER") == ("S", "PER")
    assert split_tag("L-PER") == ("E", "PER")
    assert [split_tag(tag) for tag in ("O", "NOUN", "X-PER", "B-", "-")] == [("O", "")] * 5


def test_scores_are_those_of_seqeval() -> None:
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    wanted, found = _sentences(names, 60), [row[::-1] for row in _sentences(names, 60)]
    longest = max(map(len, wanted))
    labels = torch.tensor([[*map(names.index, row), *[-100] * (longest - len(row))] for row in wanted])
    predicted = torch.tensor([[*map(names.index, row), *[3] * (longest - len(row))] for row in found])
    count, metrics = tag_metrics(names)
    assert [*metrics] == ["f1", "precision", "recall", "f1_LOC", "f1_PER", "accuracy"]
    for first in range(0, 60, 7):  # in batches
        counts = count(predicted[first : first + 7], labels[first : first + 7])
        for metric in metrics.values():
            metric.update(counts)
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert metrics[name].compute().item() == pytest.approx(score(wanted, found))
        assert metrics[name].compute().item() > 0.01
    by_kind = f1_score(wanted, found, average=None)
    assert [metrics[f"f1_{kind}"].compute().item() for kind in ("LOC", "PER")] == pytest.approx(by_kind.tolist())
    right = [one == other for row, its in zip(wanted, found, strict=True) for one, other in zip(row, its, strict=True)]
    assert metrics["accuracy"].compute().item() == pytest.approx(sum(right) / len(right))


def test_tags_without_entities_have_an_accuracy_only() -> None:
    assert [*tag_metrics(["NOUN", "VERB"])[1]] == ["accuracy"]


CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\r\nrejects VBZ O\n \n\nPeter NNP B-PER\n"


def test_conll_files() -> None:
    table, facts = conll_table(CONLL, where="x")
    rows = [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, {"tokens": ["Peter"], "tags": ["B-PER"]}]
    assert table.to_pylist() == rows
    assert facts["names"] == ["tokens", "tags"]
    assert conll_table("New York\tB-LOC\n", where="x")[0].to_pylist() == [{"tokens": ["New York"], "tags": ["B-LOC"]}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("EU B-ORG\nrejects\n", "line 2 has no word with a tag: 'rejects'"),
        ("EU\tB-ORG\nrejects\t\n", "line 2 has no word with a tag"),
        ("EU B-ORG\nNew York B-LOC\n", "line 2 has 3 columns, but 2 before"),
    ],
)
def test_bad_conll_files(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        conll_table(text, where="x")


def _split(words: Any, tags: Any, names: list[str] | None = None) -> datasets.Dataset:
    found = datasets.Dataset.from_dict({"words": words, "tags": tags})
    return found if names is None else found.cast_column("tags", datasets.List(datasets.ClassLabel(names=names)))


def test_numbers_of_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    train = _split([["a", "b"], ["c"]], [["B-PER", "I-LOC"], ["O"]])
    splits = {"train": train, "eval": _split([["d", "e"]], [["B-LOC", "I-PER"]])}
    numbered, names = numbered_tags(splits, source="x", called=CALLED)
    assert names == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]  # both prefixes of each type
    assert numbered["train"]["tags"][:] == [[3, 2], [0]]
    assert numbered["eval"]["tags"][:] == [[1, 4]]
    declared = {"train": _split([["a", "b"]], [[1, 0]], ["X", "B-PER"])}
    assert numbered_tags(declared, source="x", called=CALLED)[1] == ["X", "B-PER"]
    numbers = {"train": _split([["a", "b"]], [[1, 0]])}
    assert numbered_tags(numbers, source="x", called=CALLED, names=["O", "B-PER"])[1] == ["O", "B-PER"]


GOOD = _split([["a"], ["b", "c"]], [["O"], ["O", "B-PER"]])


@pytest.mark.parametrize(
    ("train", "held_out", "names", "says"),
    [
        (GOOD, _split([["a"]], [["B-ORG"]]), (), "row 1 of the eval data has the tag 'B-ORG', which the training"),
        (GOOD, _split([["a"]], [[1]]), (), "the tags 'tags' of the eval data are numbers without names"),
        (_split([["a"], ["b", "c"]], [["O"], ["O"]]), GOOD, (), "row 2 of the train data has 2 words and 1 tags"),
        (_split([["a"]], [["O"]]), _split([["a"]], [["O"]]), (), "have the tag 'O'; at least two are required"),
        (
            _split([["a"]], [[1]]),
            _split([["a"]], [[2]]),
            ("O", "B-X"),
            "row 1 of the eval data has the tag 2; tags",
        ),
        (_split([["a"]], [["O"]]), GOOD, ("O", "B-X"), "--tag-names: the tags of the train data have names"),
        (_split(["a b"], [["O"]]), GOOD, (), "row 1 of the train data: 'tokens' is not a list of words"),
        (_split([["a"]], ["O"]), GOOD, (), "column 'tags' must hold lists of tags"),
    ],
)
def test_bad_tags(train: Any, held_out: Any, names: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        numbered_tags({"train": train, "eval": held_out}, source="x", called=CALLED, names=names)


def test_words_as_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word has its label once, at its first token, also where a sentence is divided or the tokenizer has none."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bert_dir())
    words = ["Shardlaunchers", "like", "\u200b", "unbelievable", "Verona", "supercalifragilistic" * 3]
    split = _split([words, ["a", "film"], []], [[5, 4, 3, 2, 1, 0], [1, 2], []])
    rows = [*tagged_tokens(split, tokenizer, name="train", max_length=12)]
    assert [label for row in rows for label in row["labels"] if label >= 0] == [5, 4, 3, 2, 1, 0, 1, 2]
    assert max(row["length"] for row in rows) == 12
    for row in rows:
        assert row["input_ids"][0] == tokenizer.cls_token_id
        assert row["input_ids"][-1] == tokenizer.sep_token_id
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    whole = tokenizer(words[:2], is_split_into_words=True)["input_ids"]
    assert rows[0]["input_ids"][: len(whole) - 1] == whole[:-1]
    assert tokenizer.unk_token_id in rows[0]["input_ids"] + rows[1]["input_ids"]

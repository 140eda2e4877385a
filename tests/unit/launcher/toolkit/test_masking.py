"""Masks: their shares, whole words, and that they follow from a seed."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from shardlaunch import UserError
from shardlaunch.launcher.toolkit.demo_data import bert_dir
from shardlaunch.launcher.toolkit.masking import NO_WORD, Masking, rows_of_words, seed_of_row

TOKENIZER = AutoTokenizer.from_pretrained(bert_dir())
SPECIAL = (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id)


def _row(count: int) -> tuple[list[int], list[int]]:
    """Return a row of words of two tokens each."""
    ids = [SPECIAL[0], *(2000 + place for place in range(2 * count)), SPECIAL[1]]
    return ids, [NO_WORD, *(place // 2 for place in range(2 * count)), NO_WORD]


@pytest.mark.parametrize("whole_words", [False, True])
def test_shares_of_masks(whole_words: bool) -> None:
    masking = Masking(TOKENIZER, share=0.2, whole_words=whole_words)
    ids, words = _row(10_000)
    inputs, labels = (np.array(part) for part in masking(ids, words, seed=5))
    is_target = labels != -100
    assert (labels[is_target] == np.array(ids)[is_target]).all()
    assert (inputs[~is_target] == np.array(ids)[~is_target]).all()
    assert not is_target[[0, -1]].any()
    assert is_target.mean() == pytest.approx(0.2, abs=0.02)
    assert (inputs[is_target] == TOKENIZER.mask_token_id).mean() == pytest.approx(0.8, abs=0.02)
    assert (inputs[is_target] == labels[is_target]).mean() == pytest.approx(0.1, abs=0.02)
    pairs = is_target[1:-1].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all() == whole_words


def test_masks_follow_from_a_seed() -> None:
    masking = Masking(TOKENIZER, share=0.15, whole_words=False)
    ids, words = _row(30)
    assert masking(ids, words, seed=1) == masking(ids, words, seed=1)
    assert masking(ids, words, seed=1) != masking(ids, words, seed=2)
    assert seed_of_row(ids, 0) == seed_of_row([*ids], 0)
    assert len({seed_of_row(ids, 0), seed_of_row(ids, 1), seed_of_row(ids[1:], 0)}) == 3


def test_a_row_has_at_least_one_target() -> None:
    masking = Masking(TOKENIZER, share=1e-9, whole_words=True)
    for seed in range(20):
        _, labels = masking(*_row(4), seed=seed)
        assert sum(label != -100 for label in labels) == 2


def test_rows_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    texts = ["An unbelievable film. [MASK]", "", "the " * 20]
    rows = [*rows_of_words(datasets.Dataset.from_dict({"text": texts}), TOKENIZER, max_length=12)]
    found: list[Any] = [id_ for row in rows for id_ in row["input_ids"][1:-1]]
    whole = [
        id_
        for text in texts
        for id_ in TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ]
    assert found == whole
    assert TOKENIZER.mask_token_id not in found
    assert max(row["length"] for row in rows) == 12
    for row in rows:
        assert (row["input_ids"][0], row["input_ids"][-1]) == SPECIAL
        assert [word == NO_WORD for word in row["words"]] == [True, *[False] * (row["length"] - 2), True]


def test_what_has_no_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="no text in the data has a token"):
        rows_of_words(datasets.Dataset.from_dict({"text": [""]}), TOKENIZER, max_length=12)
    other = AutoTokenizer.from_pretrained(bert_dir())
    other.mask_token = None
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        Masking(other, share=0.1, whole_words=False)

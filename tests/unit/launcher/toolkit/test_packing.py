"""Documents in blocks: every token is a target once, and no document sees another."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from shardlaunch import TensorData, UserError
from shardlaunch.launcher.toolkit.demo_data import bert_dir
from shardlaunch.launcher.toolkit.families import PACKING_MODELS
from shardlaunch.launcher.toolkit.packing import NO_TARGET
from shardlaunch.text import cut_blocks, pack, positions, tokenized, train_tokenizer

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTHS = {
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 12,
    "rotary_dim": 4,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _packed(documents: list[list[int]], **options: int) -> dict[str, torch.Tensor]:
    return _data(documents, **options).columns


def _data(documents: list[list[int]], **options: int) -> TensorData:
    units = [[token + 1 for token in document] for document in documents]
    return pack(Dataset.from_dict({"tokens": documents, "units": units}), **options)


def test_blocks() -> None:
    columns = _packed([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]], block_length=4)
    assert columns["inputs"].tolist() == [[1, 2, 4, 6], [7, 8, 9, 0]]
    assert columns["labels"].tolist() == [[2, 3, 5, 7], [8, 9, 10, NO_TARGET]]
    assert positions(columns["documents"]).tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]


def test_documents_of_one_token_and_of_none() -> None:
    columns = _packed([[], [1, 2], [3], [], [4, 5, 6]], block_length=3)
    assert columns["inputs"].tolist() == [[1, 4, 5]]
    assert columns["labels"].tolist() == [[2, 5, 6]]
    with pytest.raises(UserError, match="no document"):
        _packed([[], [1]], block_length=3)


def test_every_pair_of_neighbours_is_a_target_once() -> None:
    rng = np.random.default_rng(0)
    first = np.cumsum(rng.integers(1, 9, size=50))
    documents = [list(range(begin, end)) for begin, end in pairwise(first)]
    columns = _packed(documents, block_length=7)
    is_target = columns["labels"] != NO_TARGET
    expected = [token for document in documents for token in document[1:]]
    assert columns["labels"][is_target].tolist() == expected
    assert (columns["inputs"][is_target] + 1).tolist() == expected
    assert columns["units"][is_target].tolist() == [token + 1 for token in expected]


def test_shifted_blocks() -> None:
    """The block depends only on the row and its seed, and is within the text."""
    data = _data([list(range(41))], block_length=8, window=16)
    assert len(data) == 5
    rows = data.rows_at(np.array([0, 3, 4]))
    seeds = np.array([7, 8 * 1000 + 3, 5])
    blocks = cut_blocks(rows, seeds, block_length=8)
    assert blocks["inputs"][:, 0].tolist() == [7, 27, 37]
    assert blocks["labels"][:2].tolist() == [list(range(8, 16)), list(range(28, 36))]
    assert blocks["labels"][2].tolist() == [38, 39, 40, *[NO_TARGET] * 5]
    assert cut_blocks(rows, None, block_length=8)["inputs"][:, 0].tolist() == [0, 24, 32]
    assert data.fingerprint() == TensorData(**data.columns).fingerprint()


@pytest.mark.parametrize("unit", ["byte", "character"])
def test_units_of_text(unit: Any) -> None:
    """All of a text is counted, whether its characters share tokens, are split, or are dropped by the tokenizer."""
    texts = ["a film", " Ünï 你好\n<|end|>  ", "", "\U0001f600!"]
    end = "<|end|>"
    for tokenizer in (
        train_tokenizer(texts[:1] * 5, vocab_size=262, bos_token=end, eos_token=end),
        train_tokenizer(texts, kind="characters", bos_token=end, eos_token=end, unk_token="?"),
        AutoTokenizer.from_pretrained(bert_dir()),
    ):
        for framed in (False, True):
            columns = tokenized(texts, tokenizer, unit=unit, framed=framed)
            sums = [int(units.sum()) for units in columns["units"]]
            assert sums == [len(text.encode() if unit == "byte" else text) for text in texts]
            assert [len(units) for units in columns["units"]] == [len(tokens) for tokens in columns["tokens"]]
            is_end = [tokens == tokenizer.convert_tokens_to_ids(end) for tokens in columns["tokens"]]
            if tokenizer.eos_token:
                assert [int(found.sum()) for found in is_end] == [2 * framed] * 4


@pytest.mark.parametrize("kind", PACKING_MODELS)
@torch.no_grad()
def test_a_document_does_not_see_its_neighbours(kind: str) -> None:
    """Its logits are the same as without the other documents."""
    sizes = {**SMALL, **WIDTHS, **TOKENS, "n_positions": 12}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).eval()

    def logits(documents: list[list[int]]) -> torch.Tensor:
        columns = _packed(documents, block_length=12)
        places = positions(columns["documents"])
        result: torch.Tensor = model(columns["inputs"].long(), position_ids=places, use_cache=False).logits
        return result[0]

    middle = [7, 8, 9, 10, 11, 12]
    beside = logits([[1, 2, 3, 4], middle, [20, 21, 22, 23, 24]])[3:8]
    assert torch.equal(beside, logits([[31, 41, 5, 9], middle, [2, 6, 5, 3, 5]])[3:8])
    torch.testing.assert_close(beside, logits([middle])[:5])
    # What the test can see: in one document with its neighbour the same tokens have other logits.
    assert not torch.allclose(beside, logits([[1, 2, 3, *middle, 20]])[3:8])

"""Rows of tokens with masks, for masked language models (Devlin et al. 2018)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.packing import NO_TARGET
from shardlaunch.launcher.toolkit.pretrained import tokenizer_key

NO_WORD = -1  # the word of a special token


def rows_of_words(texts: Any, tokenizer: Any, *, max_length: int) -> Any:
    """Return rows of `input_ids` in special tokens, the number of each token's word in `words`, and `length`.

    A text of more than `max_length` tokens makes several rows. Raises UserError if no text has a token.
    """
    framed = tokenizer("a", return_special_tokens_mask=True)
    inner = [place for place, special in enumerate(framed["special_tokens_mask"]) if not special]
    start, end = framed["input_ids"][: inner[0]], framed["input_ids"][inner[-1] + 1 :]
    room = max_length - len(start) - len(end)

    def cut(batch: list[str]) -> dict[str, Any]:
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)
        columns: dict[str, list[Any]] = {"input_ids": [], "words": [], "length": []}
        for number, ids in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(number)
            for first in range(0, len(ids), room):
                part = slice(first, first + room)
                columns["input_ids"].append([*start, *ids[part], *end])
                columns["words"].append([*[NO_WORD] * len(start), *words[part], *[NO_WORD] * len(end)])
                columns["length"].append(len(columns["words"][-1]))
        return columns

    rows = derived(
        texts,
        cut,
        key=("rows of words", 1, tokenizer_key(tokenizer), max_length),
        doing="tokenizing",
        input_columns=["text"],
        remove_columns=texts.column_names,
    )
    if not len(rows):
        raise UserError("no text in the data has a token to predict")
    return rows


class Masking:
    """Draws which tokens of a row are to be predicted, and what stands in their place."""

    def __init__(self, tokenizer: Any, *, share: float, whole_words: bool) -> None:
        """Mask a `share` of the tokens, of words with `whole_words`. Raises UserError without a mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token; choose the --model of a masked language model")
        self._mask, self._share, self._whole_words = tokenizer.mask_token_id, share, whole_words
        special = {*tokenizer.all_special_ids}
        self._others = np.array([number for number in range(len(tokenizer)) if number not in special])

    def __call__(self, ids: Sequence[int], words: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
        """Return a row's inputs and labels, drawn by a seed: at least one token or word is to be predicted.

        Of the tokens to predict, 80 % are masked, 10 % are another at random, and 10 % stay.
        """
        rng = np.random.default_rng(seed)
        tokens, of_words = np.array(ids), np.array(words)
        units = of_words if self._whole_words else np.where(of_words == NO_WORD, NO_WORD, np.arange(len(tokens)))
        known = np.unique(units[units != NO_WORD])
        is_chosen = rng.random(len(known)) < self._share
        is_chosen[rng.integers(len(known))] |= not is_chosen.any()
        is_target = np.isin(units, known[is_chosen])
        draw = rng.random(len(tokens))
        others = self._others[rng.integers(len(self._others), size=len(tokens))]
        inputs = np.where(draw < 0.8, self._mask, np.where(draw < 0.9, others, tokens))
        return np.where(is_target, inputs, tokens).tolist(), np.where(is_target, tokens, NO_TARGET).tolist()


def seed_of_row(ids: Sequence[int], seed: int) -> int:
    """Return a seed that follows from a row's tokens: its masks are the same in each evaluation."""
    return xxhash.xxh3_64_intdigest(np.array([seed, *ids], dtype="<i8").tobytes())

"""Pairs of texts that belong together, as tokens, and the losses that compare them with other pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.pretrained import tokenizer_key


def tokenized_texts(
    split: Any, tokenizer: Any, *, name: str, prefixes: Mapping[str, str], max_length: int, source: str
) -> Any:
    """Return each column of `prefixes` as tokens, with the prefix in front; `NAME_text`, its text's number; `length`.

    Texts are alike if their numbers (int64) are. The length is that of the longest text of a row. Says how many texts
    are cut off at `max_length`, and how many stand in several rows. Raises UserError for an empty text.
    """
    roles = [*prefixes]

    def tokenize(*columns: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for role, texts in zip(roles, columns, strict=True):
            encoded = tokenizer([prefixes[role] + text for text in texts], truncation=True, max_length=max_length)
            found[role] = encoded["input_ids"]
            found[f"{role}_text"] = [xxhash.xxh3_64_intdigest(text.encode(errors="replace")) >> 1 for text in texts]
        lengths = [[len(ids) for ids in found[role]] for role in roles]
        return {**found, "length": [max(row) for row in zip(*lengths, strict=True)]}

    for role in roles:
        for row, text in enumerate(split[role][:], start=1):
            if not text.strip():
                raise UserError(f"--data {source}: row {row} of the {name} data has an empty {role!r}; remove it")
    tokens = derived(
        split,
        tokenize,
        key=("pairs of texts", 1, tokenizer_key(tokenizer), max_length, [*prefixes.items()]),
        doing="tokenizing",
        input_columns=roles,
        remove_columns=roles,
    )
    if longer := int((np.array(tokens["length"][:]) >= max_length).sum()):
        current().warnings.append(
            f"--max-length {max_length}: {longer:,} of {len(tokens):,} pairs of the {name} data have a text of as many "
            f"tokens, or a longer one, which is cut off"
        )
    for role in roles[:2]:
        if repeated := len(tokens) - len(np.unique(np.array(tokens[f"{role}_text"][:]))):
            current().remarks.append(
                f"{repeated:,} of {len(tokens):,} texts {role!r} of the {name} data repeat another, and are no "
                f"negatives of its pairs"
            )
    return tokens


def pooled(states: torch.Tensor, mask: torch.Tensor, *, pooling: str) -> torch.Tensor:
    """Return one vector of length 1 per row (float32): the mean of its tokens' states, or the state of the first one.

    `states`: [rows, length, dim], `mask`: [rows, length], padding on the right.
    """
    if pooling == "cls":
        return F.normalize(states[:, 0].float(), dim=-1)
    weights = mask[:, :, None].float()
    return F.normalize((states.float() * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def ranking_loss(
    rows: Sequence[torch.Tensor], all_rows: Sequence[torch.Tensor], first: int, *, temperature: float, both_ways: bool
) -> torch.Tensor:
    """Return the summed loss of pairs that are each to be found among all (InfoNCE).

    `rows` and `all_rows`, of which rows are those from `first` on: numbers of texts [pairs, roles], then the vectors of
    anchors and positives, and maybe negatives. Each anchor is to find its positive among all positives and negatives;
    if `both_ways`, each positive its anchor too, and the loss is the mean of the two. What has the text of the
    positive, or belongs to an anchor of the same text, is no negative.
    """
    texts, anchors, positives, *_ = rows
    all_texts, all_anchors, all_positives, *negatives = all_rows
    count = len(anchors)
    own = torch.arange(first, first + count, device=anchors.device)
    is_same = (texts[:, None, :2] == all_texts[None, :, :2]).any(dim=2)
    is_same[torch.arange(count, device=anchors.device), own] = False
    scores = anchors @ all_positives.T / temperature
    scores = scores.masked_fill(is_same, -torch.inf)
    for number, vectors in enumerate(negatives, start=2):
        is_positive = texts[:, None, 1] == all_texts[None, :, number]
        others = (anchors @ vectors.T / temperature).masked_fill(is_positive, -torch.inf)
        scores = torch.cat((scores, others), dim=1)
    loss = F.cross_entropy(scores, own, reduction="sum")
    if not both_ways:
        return loss
    back = (positives @ all_anchors.T / temperature).masked_fill(is_same, -torch.inf)
    return (loss + F.cross_entropy(back, own, reduction="sum")) / 2

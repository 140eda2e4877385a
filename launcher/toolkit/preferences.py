"""Pairs of answers, one preferred to the other, as tokens: texts after a prompt, or conversations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.chats import (
    ASSISTANT,
    Messages,
    chat_tokens,
    checked_messages,
    left_out,
    note_template,
    set_chat_template,
    special_ids,
    template_key,
)
from shardlaunch.launcher.toolkit.derived import by_row
from shardlaunch.launcher.toolkit.packing import NO_TARGET, document_frame

SIDES = ("chosen", "rejected")


def tokenized_pairs(
    splits: Mapping[str, Any], tokenizer: Any, *, chat_template: str, source: str, called: Mapping[str, str]
) -> dict[str, Any]:
    """Return pairs as `chosen` and `rejected` (input tokens), `chosen_labels` and `rejected_labels`, and `length`.

    Labels are the next tokens of the answer, -100 for those of the prompt. The splits have the columns `chosen`,
    `rejected` and mostly `prompt`, called `called` in --data `source`: texts, each answer ended by the end-of-text
    token, or messages, which go through the chat template (`chat_template`: as of `set_chat_template`). Without a
    prompt, messages that both sides begin with are it. Raises UserError for a row that is no pair.
    """
    are_chats = _are_chats(splits["train"], source=source, called=called["chosen"])
    if are_chats:
        set_chat_template(tokenizer, chat_template)
    elif chat_template:
        raise UserError(f"--chat-template: the column {called['chosen']!r} has texts, not messages; remove it")
    elif "prompt" not in splits["train"].column_names:
        raise UserError(
            f"--data {source}: texts to choose from need a column with their prompt; name it with --prompt-column"
        )
    return {
        name: by_row(
            split,
            _PairTokens(tokenizer, [*called], are_chats=are_chats),
            columns=[*called],
            key=("pairs", 1, [*called], are_chats, *template_key(tokenizer)),
            where=f"--data {source}: row {{row}} of the {name} data",
        )
        for name, split in splits.items()
    }


class _PairTokens:
    """Makes tokens of a pair, given its values in the order of `columns`."""

    def __init__(self, tokenizer: Any, columns: list[str], *, are_chats: bool) -> None:
        self._tokenizer = tokenizer
        self._columns = columns
        self._are_chats = are_chats
        self._ends = special_ids(tokenizer)

    def __call__(self, *values: Any) -> dict[str, Any]:
        row = dict(zip(self._columns, values, strict=True))
        found: dict[str, Any] = {"left_out": "", "is_ended": True}
        sides = self._chats(row, found) if self._are_chats else self._texts(row)
        for side, (tokens, is_target) in zip(SIDES, sides, strict=True):
            labels = np.where(is_target, tokens, NO_TARGET)[1:]
            if not (labels >= 0).any():
                raise UserError(f"{side!r} has no token to compare")
            found |= {side: tokens[:-1], f"{side}_labels": labels}
        return {**found, "length": max(len(found[side]) for side in SIDES)}

    def _texts(self, row: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        for name, text in row.items():
            if not isinstance(text, str):
                raise UserError(f"{name!r} is not a text")
        start, end = document_frame(self._tokenizer)
        prompt = [*start, *self._ids(row["prompt"])]
        answers = [[*self._ids(row[side]), *end] for side in SIDES]
        return [
            (np.array([*prompt, *answer]), np.repeat([0, 1], [len(prompt), len(answer)])) for answer in answers
        ]  # apart, as when an answer is generated after a prompt

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return ids

    def _chats(self, row: Mapping[str, Any], found: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        sides = []
        *talks, num_prompt = _conversations(row, self._tokenizer)
        for messages in talks:
            tokens, _, is_target = chat_tokens(messages, self._tokenizer, unit="byte", num_prompt=num_prompt)
            found["left_out"] = found["left_out"] or left_out(messages, self._tokenizer)
            found["is_ended"] &= bool(self._ends.intersection(np.array(tokens)[is_target == 1]))
            sides.append((np.array(tokens), is_target))
        return sides


def _are_chats(split: Any, *, source: str, called: str) -> bool:
    """Return whether the answers are messages, or texts. Raises UserError if they are neither."""
    first = split[0]["chosen"]
    if isinstance(first, str):
        return False
    if isinstance(first, list):
        return True
    raise UserError(
        f"--data {source}: column {called!r} must hold texts or lists of messages, not {split.features['chosen']}"
    )


def _conversations(row: Mapping[str, Any], tokenizer: Any) -> tuple[Messages, Messages, int]:
    """Return the whole conversations of both sides, and the number of messages that are the prompt."""
    sides = [_messages(row[side], side, tokenizer) for side in SIDES]
    prompt = row.get("prompt")
    if prompt is not None:
        before = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else checked_messages(prompt, tokenizer, needs_answer=False)
        )
        sides = [messages if messages[: len(before)] == before else [*before, *messages] for messages in sides]
    chosen, rejected = sides
    same = next((n for n, (one, other) in enumerate(zip(*sides, strict=False)) if one != other), min(map(len, sides)))
    num_prompt = min(same, len(chosen) - 1, len(rejected) - 1)
    for side, messages in zip(SIDES, sides, strict=True):
        if not any(message["role"] == ASSISTANT for message in messages[num_prompt:]):
            raise UserError(f"{side!r} has no answer (a message of role {ASSISTANT!r}) after the prompt")
    return chosen, rejected, num_prompt


def _messages(value: Any, side: str, tokenizer: Any) -> list[dict[str, Any]]:
    try:
        return checked_messages(value, tokenizer)
    except UserError as error:
        raise UserError(f"{side!r}: {error}") from error


def usable_pairs(split: Any, name: str, *, most: int, source: str) -> Any:
    """Return pairs of `tokenized_pairs` without those that are alike, or longer than `most` tokens: these are counted.

    Raises UserError if none is left.
    """
    note_template(split, name)
    lengths = np.array(split["length"][:])
    is_same = np.zeros(len(split), dtype=bool)
    for row, pair in enumerate(split):
        is_same[row] = pair["chosen"] == pair["rejected"] and pair["chosen_labels"] == pair["rejected_labels"]
    is_long = ~is_same & (lengths > most)
    for which, why in (
        (is_same, "have the same answer twice"),
        (is_long, f"are longer than --context-length {most}"),
    ):
        if which.any():
            current().warnings.append(f"{which.sum():,} of {len(split):,} pairs of the {name} data {why}: not used")
    (rows,) = np.nonzero(~(is_long | is_same))
    if not len(rows):
        raise UserError(
            f"--data {source}: no pair of the {name} data can be used: {is_same.sum():,} have the same answer twice, "
            f"{is_long.sum():,} are longer than --context-length {most}"
        )
    kept = split if len(rows) == len(split) else split.select(rows)
    return kept.remove_columns(["left_out", "is_ended"])

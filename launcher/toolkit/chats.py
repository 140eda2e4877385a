"""Conversations through a tokenizer's chat template, with the assistant's answers marked."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.packing import Unit, units_of
from shardlaunch.launcher.toolkit.pretrained import tokenizer_key

Messages = Sequence[Mapping[str, Any]]
ASSISTANT = "assistant"


def tokenized_chats(
    splits: Mapping[str, Any], tokenizer: Any, *, unit: Unit, source: str, called: str
) -> dict[str, Any]:
    """Return the splits' column `messages` as tokens, units per token, and `is_target`: 1 for tokens of answers.

    The tokens are those of `apply_chat_template`. `called` is the column's name in --data `source`. Raises UserError
    without a chat template, and for a conversation that the template or its parts do not allow, with its row.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"--messages-column {called}: the tokenizer has no chat template; use the tokenizer of a chat model "
            f"(--tokenizer), or save one with a chat_template"
        )
    key = ("chats", tokenizer_key(tokenizer), str(tokenizer.chat_template), str(tokenizer.special_tokens_map), unit)

    def split_of(name: str) -> Any:
        def tokenize(conversations: list[Any], rows: list[int]) -> dict[str, Any]:
            columns: dict[str, list[Any]] = {"tokens": [], "units": [], "is_target": []}
            for row, messages in zip(rows, conversations, strict=True):
                try:
                    parts = chat_tokens(_checked(messages), tokenizer, unit=unit)
                except UserError as error:
                    raise UserError(
                        f"--data {source}: row {row + 1} of the {name} data, {called!r}: {error}"
                    ) from error
                for column, values in zip(columns.values(), parts, strict=True):
                    column.append(values)
            return columns

        return derived(
            splits[name],
            tokenize,
            key=key,
            doing="tokenizing",
            with_indices=True,
            input_columns=["messages"],
            remove_columns=["messages"],
        )

    return {name: split_of(name) for name in splits}


def note_longer(splits: Mapping[str, Any], length: int) -> None:
    """Warn of conversations with more than `length` tokens, which are cut off there, and of those without an answer."""
    for name, split in splits.items():
        longer = without = 0
        for batch in split.with_format("numpy").iter(1000):
            for is_target in batch["is_target"]:
                longer += len(is_target) - 1 > length
                without += not is_target[1 : length + 1].any()
        if longer:
            current().warnings.append(
                f"--context-length {length}: {longer:,} of {len(split):,} conversations of the {name} data are longer "
                f"and cut off"
            )
        if without:
            current().warnings.append(
                f"{without:,} of {len(split):,} conversations of the {name} data have no answer within "
                f"--context-length {length}: not used"
            )


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Return messages without the keys that only other rows have. Raises UserError for what is no conversation."""
    expected = 'expected a list of {"role": ..., "content": ...}'
    if not isinstance(messages, list) or not messages:
        raise UserError(f"no messages; {expected}")
    if not all(isinstance(message, dict) for message in messages):
        raise UserError(f"a message is not an object; {expected}")
    found = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for number, message in enumerate(found, start=1):
        if not isinstance(message.get("role"), str):
            raise UserError(f"message {number} has no role; {expected}")
    return found


def chat_tokens(messages: Messages, tokenizer: Any, *, unit: Unit) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return a conversation's tokens, the units that each covers, and 1 for those of answers, else 0.

    Where the template marks answers itself ({% generation %}), those are taken. Otherwise an answer is what the
    template adds to the messages before and the start of an answer, up to the next message.
    """
    text = _rendered(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        marked = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        is_target = np.array(marked["assistant_masks"], dtype=np.int32)
    else:
        is_target = np.zeros(len(offsets), dtype=np.int32)
        for first, last in _answers(messages, text, tokenizer):
            is_target |= (offsets[:, 1] > first) & (offsets[:, 0] < last)
    before = np.cumsum(units_of(text, unit))
    return encoded["input_ids"], (before[offsets[:, 1]] - before[offsets[:, 0]]).astype(np.int32), is_target


def _rendered(messages: Messages, tokenizer: Any, *, to_answer: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"the chat template refuses it ({reason})") from error
    assert isinstance(text, str)
    return text


def _answers(messages: Messages, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Return where each answer starts and ends in a rendered conversation, in characters."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _rendered(messages[:number], tokenizer) if number else ""
        prompt = _rendered(messages[:number], tokenizer, to_answer=True) if number else ""
        after = _rendered(messages[: number + 1], tokenizer)
        first = len(prompt)
        if not text.startswith(after) or not after.startswith(prompt):
            raise UserError(
                f"the chat template renders message {number + 1} differently with what follows it (as templates do "
                f"that drop earlier reasoning), so that its answer cannot be told apart; mark answers in the template "
                f"with {{% generation %}}, or keep only the last answer of each conversation"
            )
        if prompt == before:  # the template has no start of an answer of its own: it begins at its content
            content = message.get("content")
            first = after.find(content.strip(), len(before)) if isinstance(content, str) and content.strip() else -1
            if first < 0:
                raise UserError(
                    f"the chat template does not show where message {number + 1}, an answer, starts; mark answers "
                    f"in it with {{% generation %}}"
                )
        found.append((first, len(after)))
    return found

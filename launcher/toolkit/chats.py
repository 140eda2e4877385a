"""Conversations through a tokenizer's chat template, with the assistant's answers marked."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.derived import by_row
from shardlaunch.launcher.toolkit.packing import Unit, units_of
from shardlaunch.launcher.toolkit.pretrained import tokenizer_key

Messages = Sequence[Mapping[str, Any]]
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")
PLAIN = "plain"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def set_chat_template(tokenizer: Any, template: str) -> None:
    """Give a tokenizer the template of --chat-template: `plain`, that of a file, or its own (empty).

    Raises UserError for a file that cannot be read, and where the tokenizer has no template or no end-of-text token.
    """
    own = tokenizer.chat_template
    if template == PLAIN:
        if tokenizer.eos_token is None:
            raise UserError(
                f"--chat-template {PLAIN}: ends answers with the end-of-text token, and the tokenizer has none"
            )
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif template:
        try:
            tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat-template {template}: neither {PLAIN} nor a file that can be read: {error}"
            ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer has no chat template, which conversations need; use that of a chat model, or give one: "
            f"--chat-template {PLAIN}, or a file"
        )
    if own and own != tokenizer.chat_template:
        current().remarks.append(f"chat template: --chat-template {template} in place of the tokenizer's own")


def template_key(tokenizer: Any) -> tuple[str, ...]:
    """Return what the tokens of a conversation depend on, as part of a key for `derived`."""
    return (tokenizer_key(tokenizer), str(tokenizer.chat_template), str(tokenizer.special_tokens_map))


def tokenized_chats(
    splits: Mapping[str, Any], tokenizer: Any, *, unit: Unit, source: str, called: str
) -> dict[str, Any]:
    """Return the splits' column `messages` as tokens, units per token, and `is_target`: 1 for tokens of answers.

    The tokens are those of `apply_chat_template`. `called` is the column's name in --data `source`. Raises UserError
    for a conversation without an answer, and for one that the template or its parts do not allow, with its row. Warns
    of messages that the template leaves out, and of answers whose end is not learned.
    """
    ends = special_ids(tokenizer)

    def chat(conversation: Any) -> dict[str, Any]:
        messages = checked_messages(conversation, tokenizer)
        tokens, units, is_target = chat_tokens(messages, tokenizer, unit=unit)
        last = is_target[: is_target.nonzero()[0].max(initial=-1) + 1]
        answer = tokens[last.size - np.argmin(np.append(last[::-1], 0)) : last.size]  # the last run of targets
        return {
            "tokens": tokens,
            "units": units,
            "is_target": is_target,
            "left_out": left_out(messages, tokenizer),
            "is_ended": bool(ends.intersection(answer)),
        }

    found = {
        name: by_row(
            split,
            chat,
            columns=["messages"],
            key=("chats", 2, *template_key(tokenizer), unit),
            where=f"--data {source}: row {{row}} of the {name} data, {called!r}",
        )
        for name, split in splits.items()
    }
    for name, split in found.items():
        note_template(split, name)
    return found


def contents_of(conversations: Iterable[Any]) -> Iterator[str]:
    """Yield the texts of all messages, to train a tokenizer on; what is no conversation is left to the checks."""
    for messages in conversations:
        for message in messages if isinstance(messages, list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str):
                yield content


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens of a tokenizer, such as those that end a turn."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {*tokenizer.all_special_ids}


def left_out(messages: Messages, tokenizer: Any) -> str:
    """Return the role of the first message whose text a chat template leaves out; empty: none."""
    text = _rendered(messages, tokenizer)
    return next(
        (
            str(message["role"])
            for message in messages
            if isinstance(message.get("content"), str) and message["content"].strip() not in text
        ),
        "",
    )


def note_template(split: Any, name: str) -> None:
    """Warn of conversations whose messages the template leaves out, and of answers without a token that ends them."""
    columns = split.with_format("arrow", columns=["left_out", "is_ended"])[:]
    roles = [role for role in columns["left_out"].to_pylist() if role]
    if roles:
        current().warnings.append(
            f"the chat template leaves out or changes the text of messages in {len(roles):,} of {len(split):,} "
            f"conversations of the {name} data; roles: {', '.join(dict.fromkeys(roles))}"
        )
    open_ = len(split) - sum(columns["is_ended"].to_pylist())
    if open_:
        current().warnings.append(
            f"{open_:,} of {len(split):,} conversations of the {name} data have a last answer without a special token "
            f"at its end, so that the model does not learn to stop; let the chat template end answers with eos_token"
        )


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


def checked_messages(messages: Any, tokenizer: Any, *, needs_answer: bool = True) -> list[dict[str, Any]]:
    """Return messages without the keys that only other rows have. Raises UserError for what is no conversation."""
    expected = 'expected a list of {"role": ..., "content": ...}'
    if not isinstance(messages, list) or not messages:
        raise UserError(f"no messages; {expected}")
    if not all(isinstance(message, dict) for message in messages):
        raise UserError(f"a message is not an object; {expected}")
    found = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for number, message in enumerate(found, start=1):
        role = message.get("role")
        if not isinstance(role, str):
            raise UserError(f"message {number} has no role; {expected}")
        if role not in ROLES and role not in str(tokenizer.chat_template):
            raise UserError(
                f"message {number} has the role {role!r}, which the chat template does not name; known: "
                f"{', '.join(ROLES)}. Rename it"
            )
        if role == ASSISTANT and not (message.get("content") or message.get("tool_calls")):
            raise UserError(f"message {number}, an answer, is empty; complete or remove it")
    if needs_answer and not any(message["role"] == ASSISTANT for message in found):
        raise UserError(f"no message has the role {ASSISTANT!r}, so that there is nothing to learn; remove the row")
    return found


def chat_tokens(
    messages: Messages, tokenizer: Any, *, unit: Unit, num_prompt: int = 0
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return a conversation's tokens, the units that each covers, and 1 for those of answers, else 0.

    Answers among the first `num_prompt` messages do not count. Where the template marks answers itself
    ({% generation %}), those are taken. Otherwise an answer is what the template adds to the messages before and the
    start of an answer, up to the next message.
    """
    text = _rendered(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        marked = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        is_target = np.array(marked["assistant_masks"], dtype=np.int32)
        if num_prompt:
            is_target *= offsets[:, 1] > len(_rendered(messages[:num_prompt], tokenizer))
    else:
        is_target = np.zeros(len(offsets), dtype=np.int32)
        for first, last in _answers(messages, text, tokenizer, num_prompt=num_prompt):
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


def _answers(messages: Messages, text: str, tokenizer: Any, *, num_prompt: int) -> list[tuple[int, int]]:
    """Return where each answer behind the prompt starts and ends in a rendered conversation, in characters."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT or number < num_prompt:
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

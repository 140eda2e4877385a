"""Questions with contexts as windows of tokens, the spans of their answers, and how right predicted spans are."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.pretrained import tokenizer_key

NO_ANSWER = 0
"""Position that stands for "not in this window": that of the first special token."""
_NO_CONTEXT = -1
_EXPECTED = 'expected {"text": [...], "answer_start": [...]}, both empty if the context has no answer'
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def question_windows(
    split: Any, tokenizer: Any, *, name: str, max_length: int, stride: int, source: str, called: Mapping[str, str]
) -> Any:
    """Return windows of the columns `question`, `context` and `answers`: a long context makes several.

    Columns: `input_ids`, `token_type_ids` if the tokenizer has them, `length`, `row` (the number of the question),
    `start` and `end` of the first answer in tokens (both 0 if the window does not hold it), `first_char` and
    `last_char` of each token in the context (-1 for others), `context` and `texts` (all answers). Says how many
    contexts are divided, and how many answers no window holds as a whole. Raises UserError for an answer that does not
    stand where it should, and for a question that leaves no room, with the row.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)

    def cut(questions: list[str], contexts: list[str], answers: list[Any], rows: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for row, question, context, its_answers in zip(rows, questions, contexts, answers, strict=True):
            where = f"--data {source}: row {row + 1} of the {name} data"
            texts, starts = _checked(its_answers, context, where=f"{where}, {called['answers']!r}")
            room = max_length - special - len(tokenizer(question, add_special_tokens=False)["input_ids"])
            if room <= stride:
                raise UserError(
                    f"{where}: its question leaves {max(room, 0)} of --max-length {max_length} tokens to the context, "
                    f"which must be more than --stride {stride}; change one of the two, or shorten the question"
                )
            for window in _windows(tokenizer, question, context, max_length=max_length, stride=stride):
                span = _span(window, starts[0], starts[0] + len(texts[0])) if texts else (NO_ANSWER, NO_ANSWER)
                window |= {"row": row, "start": span[0], "end": span[1], "context": context, "texts": texts}
                for key, value in window.items():
                    found.setdefault(key, []).append(value)
        return found

    windows = derived(
        split,
        cut,
        key=("windows", 1, tokenizer_key(tokenizer), max_length, stride),
        doing="tokenizing",
        input_columns=["question", "context", "answers"],
        with_indices=True,
        remove_columns=split.column_names,
    )
    _note(windows, name, num_questions=len(split), max_length=max_length)
    return windows


def _checked(answers: Any, context: str, *, where: str) -> tuple[list[str], list[int]]:
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    starts = answers.get("answer_start") if isinstance(answers, Mapping) else None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise UserError(f"{where}: {_EXPECTED}")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not isinstance(start, int):
            raise UserError(f"{where}: {_EXPECTED}")
        if not text or context[start : start + len(text)] != text:
            there = context[max(0, start) : max(0, start) + max(1, len(text))]
            raise UserError(
                f"{where}: the answer {text!r} is not at character {start} of the context; there is {there!r}"
            )
    return texts, starts


def _windows(tokenizer: Any, question: str, context: str, *, max_length: int, stride: int) -> list[dict[str, Any]]:
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = []
    for number, ids in enumerate(encoded["input_ids"]):
        is_context = np.array([part == 1 for part in encoded.sequence_ids(number)])
        chars = np.where(is_context[:, None], np.array(encoded["offset_mapping"][number]), _NO_CONTEXT)
        window = {"input_ids": ids, "length": len(ids), "first_char": chars[:, 0], "last_char": chars[:, 1]}
        if "token_type_ids" in encoded:
            window["token_type_ids"] = encoded["token_type_ids"][number]
        found.append(window)
    return found


def _span(window: Mapping[str, Any], first: int, last: int) -> tuple[int, int]:
    """Return the first and last token of an answer, given its characters; `NO_ANSWER` twice if it is not all there."""
    begins, ends = window["first_char"], window["last_char"]
    touched = np.flatnonzero((begins >= 0) & (ends > first) & (begins < last))
    if not len(touched) or begins[touched[0]] > first or ends[touched[-1]] < last:
        return NO_ANSWER, NO_ANSWER
    return int(touched[0]), int(touched[-1])


def _note(windows: Any, name: str, *, num_questions: int, max_length: int) -> None:
    columns = windows.with_format("arrow", columns=["row", "start", "texts"])[:]
    rows, starts = columns["row"].to_numpy(), columns["start"].to_numpy()
    if len(rows) > num_questions:
        divided = int((np.bincount(rows) > 1).sum())
        current().remarks.append(
            f"{divided:,} of {num_questions:,} contexts of the {name} data are longer than --max-length {max_length} "
            f"allows, and divided into windows: {len(rows):,} in all"
        )
    has_answer = np.array([bool(texts) for texts in columns["texts"].to_pylist()])
    lost = len(np.unique(rows[has_answer])) - len(np.unique(rows[starts > 0]))
    if lost:
        current().warnings.append(
            f"{lost:,} of {num_questions:,} answers of the {name} data are longer than what windows share, and in none "
            f"as a whole: these count as not there; raise --stride"
        )


def best_spans(
    start: torch.Tensor, end: torch.Tensor, is_context: torch.Tensor, *, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first and last token and the score of the best span of each row, of at most `max_tokens` tokens.

    `start`, `end`: scores [rows, length]; `is_context`: bool of the same shape, which a span is inside of.
    """
    length = start.shape[1]
    outside = ~is_context
    scores = start.masked_fill(outside, -torch.inf)[:, :, None] + end.masked_fill(outside, -torch.inf)[:, None, :]
    is_span = torch.ones(length, length, dtype=torch.bool, device=start.device).triu().tril(max_tokens - 1)
    best, places = scores.masked_fill(~is_span, -torch.inf).flatten(1).max(dim=1)
    return places // length, places % length, best


def exact_match(predicted: str, texts: Sequence[str]) -> float:
    """Return 1 if an answer is predicted, but for case, punctuation and articles, as SQuAD's evaluation has it."""
    return max((float(_plain(predicted) == _plain(text)) for text in texts), default=float(not predicted))


def f1_of_words(predicted: str, texts: Sequence[str]) -> float:
    """Return the best F1 of the words of a predicted answer, as SQuAD's evaluation has it."""
    return max((_f1(_plain(predicted).split(), _plain(text).split()) for text in texts), default=float(not predicted))


def _plain(text: str) -> str:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))

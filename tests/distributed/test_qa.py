"""Answers as spans: their windows, scores as SQuAD's evaluation has them, unanswerable questions, and refusals."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torchmetrics.text import SQuAD
from transformers import AutoTokenizer

from shardlaunch import UserError
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.toolkit.demo_data import bert_dir
from shardlaunch.metrics import SpanScore
from shardlaunch.recipes.bert_qa import BertQa
from shardlaunch.text import NO_ANSWER, best_spans, exact_match, f1_of_words, question_windows
from tests.recipes import run_quietly, save_small_bert, training_lines

CONTEXT = " ".join(
    f"The {word} stands at number {number}." for number, word in enumerate(("abbey", "bank", "castle", "dairy"))
)
CALLED = {"question": "question", "context": "context", "answers": "answers"}


def _row(answer: str, context: str = CONTEXT) -> dict[str, Any]:
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": "What stands where?", "context": context, "answers": found}


def _windows(rows: list[dict[str, Any]], *, max_length: int = 20, stride: int = 4) -> Any:
    options: dict[str, Any] = {"name": "train", "max_length": max_length, "stride": stride, "source": "here"}
    tokenizer = AutoTokenizer.from_pretrained(bert_dir())
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "context": datasets.Value("string"),
            "answers": {"text": [datasets.Value("string")], "answer_start": [datasets.Value("int64")]},
        }
    )
    return question_windows(datasets.Dataset.from_list(rows, features=features), tokenizer, called=CALLED, **options)


def test_each_answer_is_whole_in_a_window() -> None:
    answers = ["The abbey", "castle", "3", "", "number 2"]
    windows = _windows([_row(answer) for answer in answers])
    assert len(windows) > 2 * len(answers)
    found: dict[int, set[str]] = {}
    for window in windows:
        assert window["length"] == len(window["input_ids"]) <= 20
        if window["start"] == NO_ANSWER:
            assert window["end"] == NO_ANSWER
            continue
        text = CONTEXT[window["first_char"][window["start"]] : window["last_char"][window["end"]]]
        found.setdefault(window["row"], set()).add(text)
    assert found == {row: {answer} for row, answer in enumerate(answers) if answer}


def test_divided_contexts_and_lost_answers_are_said() -> None:
    with collected() as notes:
        _windows([_row("abbey"), _row(CONTEXT[: CONTEXT.index("dairy")])])
    assert any(
        "2 of 2 contexts of the train data are longer than --max-length 20 allows" in each for each in notes.remarks
    )
    assert any("1 of 2 answers of the train data are longer than what windows share" in each for each in notes.warnings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            _row("abbey") | {"answers": {"text": ["abbey"], "answer_start": [0]}},
            "'abbey' is not at character 0 of the context; there is 'The a'",
        ),
        (_row("abbey") | {"answers": {"text": ["abbey"], "answer_start": []}}, "row 2 .* 'answers': expected"),
        (_row("abbey") | {"answers": {"text": [""], "answer_start": [0]}}, "'' is not at character 0"),
        (_row("abbey") | {"question": "who " * 20}, "row 2 .*: its question leaves 0 of --max-length 20 tokens"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _windows([_row("bank"), row])


def test_scores_are_those_of_squad() -> None:
    pairs = [
        ("the Abbey!", ["abbey"]),
        ("an old abbey", ["the abbey", "old abbey of York"]),
        ("bank", ["castle"]),
        ("a", ["an"]),
        ("two words here", ["here two words"]),
    ]
    for predicted, texts in pairs:
        metric = SQuAD()
        metric.update(
            [{"prediction_text": predicted, "id": "0"}],
            [{"answers": {"answer_start": [0] * len(texts), "text": texts}, "id": "0"}],
        )
        expected = metric.compute()
        assert 100 * exact_match(predicted, texts) == pytest.approx(expected["exact_match"].item())
        assert 100 * f1_of_words(predicted, texts) == pytest.approx(expected["f1"].item())
    assert (exact_match("", []), f1_of_words("", []), exact_match("a bank", []), f1_of_words("a bank", [])) == (
        1,
        1,
        0,
        0,
    )


def test_the_best_span_is_inside_the_context_and_not_too_long() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 6, 9, generator=generator)
    is_context = torch.zeros(6, 9, dtype=torch.bool)
    is_context[:, 3:8] = True
    first, last, best = best_spans(start, end, is_context, max_tokens=2)
    for row in range(6):
        spans = {(a, b): start[row, a] + end[row, b] for a in range(3, 8) for b in range(a, min(a + 2, 8))}
        assert (int(first[row]), int(last[row])) == max(spans, key=lambda span: float(spans[span]))
        assert best[row] == max(spans.values())


@pytest.mark.parametrize("can_be_empty", [False, True])
def test_questions_are_scored_by_their_best_window(can_be_empty: bool) -> None:
    windows = [  # question, best span, no answer, score of the span, score of none
        *((7, 1.0, 3.0, 0.5, 0.0), (7, 2.0, 2.5, 1.0, 0.0)),
        *((2, 5.0, 4.0, 0.25, 0.0), (2, 4.0, 6.0, 1.0, 0.0)),
        (9, 0.0, 1.0, 0.0, 1.0),
    ]
    expected = (0.0 + 0.25 + 1.0) / 3 if can_be_empty else (1.0 + 0.25 + 0.0) / 3
    for seed in range(5):
        metric = SpanScore(can_be_empty=can_be_empty)
        shuffled = random.Random(seed).sample(windows, len(windows))
        for part in (shuffled[:2], shuffled[2:]):
            values = torch.tensor([values for _, *values in part], dtype=torch.float64)
            metric.update(torch.tensor([question for question, *_ in part]), values)
        assert metric.compute().item() == pytest.approx(expected)


def test_unanswerable_questions_of_a_file(tmp_path: Path) -> None:
    save_small_bert(tmp_path / "model")
    rows = [_row(answer) for answer in ("abbey", "", "castle", "dairy", "", "number 1")] * 4
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:6])))
    argv = [
        *("--data", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--max-length", "20", "--stride", "4"),
        *("--max-steps", "2", "--global-batch-size", "8", "--micro-batch-size", "4", "--tracker", "none"),
    ]
    status, output = run_quietly(BertQa, [*argv, "--output-dir", str(tmp_path / "out")])
    assert status == 0, output
    (last,) = [line for line in training_lines(tmp_path / "out") if "eval/f1" in line]
    assert 0 <= last["eval/exact_match"] <= last["eval/f1"] <= 1
    status, output = run_quietly(BertQa, [*argv, "--stride", "18", "--output-dir", str(tmp_path / "other")])
    assert status == 2
    assert "which must be more than --stride 18" in output

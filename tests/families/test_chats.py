"""Conversations: tokens are those of transformers' chat template, labels are the answers' tokens and no others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardlaunch import UserError
from shardlaunch.launcher.commands.generate import Sampling, generate_texts
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.toolkit.chats import chat_tokens, set_chat_template
from tests.families.comparing import Refused, loaded, trained
from tests.families.models import save_model, save_tokenizer

CHATML = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}<s> {{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %}{% else %}{{ m.content }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ m.role }} the {{ m.content }} </s>{% endfor %}"
FORGETFUL = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content if loop.last else m.content[:3] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
TALK = [
    {"role": "system", "content": "we is good"},
    {"role": "user", "content": "the film is"},
    {"role": "assistant", "content": "very good and long"},
    {"role": "user", "content": "the dog is"},
    {"role": "assistant", "content": "red"},
]
ANSWERS = [["very", "good", "and", "long", "</s>"], ["red", "</s>"]]


def _tokenizer(folder: Path, template: str | None) -> Any:
    tokenizer = save_tokenizer(folder, kind="plain")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED, NO_PROMPT])
def test_labels_are_the_answers(template: str, tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, template)
    tokens, units, is_target = chat_tokens(TALK, tokenizer, unit="byte")
    assert tokens == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    words = tokenizer.convert_ids_to_tokens(np.array(tokens)[is_target == 1].tolist())
    assert words == [word for answer in ANSWERS for word in answer]
    assert units[is_target == 1].tolist() == [len(word) for word in words]


def test_an_answer_that_repeats_the_question(tmp_path: Path) -> None:
    """Its place is where the template puts it, not where its words come first."""
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "red"}]
    for template in (CHATML, MARKED, NO_PROMPT):
        tokens, _, is_target = chat_tokens(talk, _tokenizer(tmp_path, template), unit="byte")
        assert is_target.tolist() == [0] * (len(tokens) - 2) + [1, 1], template


@pytest.mark.parametrize(
    ("template", "talk", "says"),
    [
        (FORGETFUL, TALK, "renders message 3 differently with what follows it"),
        (STRICT, TALK, "the chat template refuses it .*user first"),
        (
            NO_PROMPT,
            [TALK[1], {"role": "assistant", "content": ""}],
            "does not show where message 2, an answer, starts",
        ),
    ],
)
def test_what_a_template_does_not_allow(template: str, talk: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        chat_tokens(talk, _tokenizer(tmp_path, template), unit="byte")


def _run(folder: Path, talks: list[Any], *options: str, template: str | None = CHATML) -> tuple[float, Path]:
    tokenizer = _tokenizer(folder / "model", template)
    save_model(folder / "model", AutoModelForCausalLM, "llama", tokenizer=tokenizer)
    (folder / "data").mkdir()
    for name in ("train", "test"):
        rows = [json.dumps({"talk": talk, "id": number}) + "\n" for number, talk in enumerate(talks)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(rows))
    argv = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--messages-column", "talk"]
    return trained("gpt_lm", [*argv, "--context-length", "40", *options], folder / "run")


def test_a_run_on_conversations(tmp_path: Path) -> None:
    """The loss is that of transformers on the answers' tokens; messages may have keys that others lack."""
    talks = [TALK[1:3], TALK, TALK[1:], [{"role": "user", "content": "a cat", "name": "we"}, TALK[2]]] * 2
    found, checkpoint = _run(tmp_path, talks)
    model, tokenizer = loaded(AutoModelForCausalLM, checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    total, count = 0.0, 0
    for talk in talks:
        tokenizer.chat_template = MARKED  # renders the same, and marks the answers for transformers
        both = tokenizer.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        labels = both["input_ids"][0].where(torch.as_tensor(both["assistant_masks"])[0] == 1, -100)[1:]
        with torch.no_grad():
            logits = model(input_ids=both["input_ids"]).logits[0, :-1]
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    assert found == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize(
    ("talks", "options", "template", "says"),
    [
        ([TALK] * 8, (), None, "the tokenizer has no chat template"),
        ([TALK, [], *[TALK] * 6], (), CHATML, "row 2 of the train data, 'talk': no messages"),
        (["we"] * 8, (), CHATML, "row 1 of the train data, 'talk': no messages"),
        ([TALK, [{"content": "a"}], *[TALK] * 6], (), CHATML, "row 2 .* message 1 has no role"),
        ([TALK, TALK[:2]] * 4, (), CHATML, "row 2 .* no message has the role 'assistant'"),
        ([TALK, [TALK[1], {"role": "gpt", "content": "a"}]] * 4, (), CHATML, "row 2 .* message 2 has the role 'gpt'"),
        ([TALK, [TALK[1], {"role": "assistant", "content": ""}]] * 4, (), CHATML, "message 2, an answer, is empty"),
        ([TALK] * 8, ("--chat-template", "nowhere"), CHATML, "--chat-template nowhere: neither plain nor a file"),
        ([TALK] * 8, ("--text-column", "talk"), CHATML, "--text-column: --messages-column replaces it"),
        ([TALK] * 8, ("--shift-blocks",), CHATML, "--shift-blocks: --messages-column has no blocks"),
    ],
)
def test_bad_conversations(
    talks: Any, options: tuple[str, ...], template: str | None, says: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=says):
        _run(tmp_path, talks, *options, template=template)


def test_what_is_longer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shardlaunch.recipes.gpt_lm import GptLm
    from tests.recipes import run_well

    _run(tmp_path, [TALK, TALK[1:3]] * 4)
    argv = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--messages-column", "talk"]
    few = ["--context-length", "20", "--max-steps", "1", "--tracker", "none", "--micro-batch-size", "2"]
    output = run_well(GptLm, [*argv, *few, "--global-batch-size", "2", "--output-dir", str(tmp_path / "short")])
    assert "4 of 8 conversations of the train data are longer and cut off" in " ".join(output.split())


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<s> {{ m.role }} {{ m.content }} </s>{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m.role }} the {{ m.content }} {% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            NO_SYSTEM,
            "leaves out or changes the text of messages in 4 of 8 conversations of the train data; roles: sys",
        ),
        (NO_END, "8 of 8 conversations of the train data have a last answer without a special token at its end"),
        (CHATML, ""),
    ],
)
def test_what_a_template_loses_is_said(template: str, says: str, tmp_path: Path) -> None:
    from shardlaunch.recipes.gpt_lm import GptLm
    from tests.recipes import run_well

    _run(tmp_path, [TALK, TALK[1:3]] * 4, template=template)
    argv = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--messages-column", "talk"]
    few = ["--context-length", "40", "--max-steps", "1", "--tracker", "none", "--micro-batch-size", "2"]
    output = run_well(GptLm, [*argv, *few, "--global-batch-size", "2", "--output-dir", str(tmp_path / "other")])
    assert says in " ".join(output.split())
    assert ("conversations of the train data" in output) == bool(says)


def test_another_template_is_said(tmp_path: Path) -> None:
    own = _tokenizer(tmp_path, CHATML)
    with collected() as notes:
        set_chat_template(own, "")
        assert not notes.remarks
        set_chat_template(own, "plain")
    assert notes.remarks == ["chat template: --chat-template plain in place of the tokenizer's own"]


def test_the_plain_template_and_answers_to_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer without a template gets the plain one, which the checkpoint keeps for `generate --chat`."""
    _, checkpoint = _run(tmp_path, [TALK, TALK[1:3]] * 4, "--chat-template", "plain", template=None)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens, _, is_target = chat_tokens(TALK, tokenizer, unit="byte")
    words = tokenizer.convert_ids_to_tokens(np.array(tokens)[is_target == 1].tolist())
    assert words == [word for answer in ANSWERS for word in answer]
    greedy = {"file": None, "max_new_tokens": 4, "sampling": Sampling(num_beams=1)}
    capsys.readouterr()
    generate_texts(checkpoint, prompts=["the film is"], chat=True, **greedy)
    text = "user:\nthe film is\n\nassistant:\n"
    assert tokenizer.apply_chat_template([TALK[1]], tokenize=False, add_generation_prompt=True) == text
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = loaded(AutoModelForCausalLM, checkpoint)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == answer + "\n"

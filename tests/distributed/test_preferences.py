"""Preference tuning: losses are those of transformers pair by pair, the base is the reference of adapters."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardlaunch.recipes.dpo_lm import DpoLm
from tests.distributed.ranks import run_on_ranks
from tests.recipes import final_tensors, losses, run_quietly, run_well, save_small_gpt, training_lines
from tests.unit.launcher.commands.test_evaluate import evaluated

ARGV = ["--global-batch-size", "8", "--micro-batch-size", "4", "--tracker", "none", "--threads-per-rank", "1"]
FIVE = [*ARGV, "--max-steps", "5", "--lr", "0.01", "--save-every", "0", "--context-length", "96"]


def _asks(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _answers(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": _asks(f"film {i}?"), "chosen": _answers("good " * (1 + i % 3)), "rejected": _answers(f"bad {i}")}
        for i in range(count)
    ]


def whole(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose sides are whole conversations, without a prompt."""
    return {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}


def texts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"film {i} is", "chosen": " good" * (1 + i % 3), "rejected": f" bad {i}"} for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_small_gpt(folder)
    return folder


def _write(folder: Path, train: list[Any], held_out: list[Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", held_out or train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _run(argv: list[str]) -> str:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return run_well(DpoLm, argv)


def _expected(rows: list[dict[str, Any]], start: Path, checkpoint: Path, *, beta: float) -> tuple[float, float]:
    """Return loss and share of right margins by transformers, one answer at a time."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (checkpoint, start)]
    margins = []
    for row in rows:
        sides = []
        for side in ("chosen", "rejected"):
            if isinstance(row[side], str):
                before = [0, *tokenizer(row["prompt"])["input_ids"]]
                ids = [*before, *tokenizer(row[side])["input_ids"], 0]
            else:
                kind = {"tokenize": True, "return_dict": True}
                before = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **kind)["input_ids"]
                ids = tokenizer.apply_chat_template([*row["prompt"], *row[side]], **kind)["input_ids"]
                ids = ids[: len(ids) - 1 - ids[::-1].index(0) + 1]  # what follows the end of text is no answer
            with torch.no_grad():
                found = [one(torch.tensor([ids])).logits[0].log_softmax(-1) for one in models]
            places = torch.arange(len(before) - 1, len(ids) - 1)
            now, then = (one[places, torch.tensor(ids)[places + 1]].sum() for one in found)
            sides.append(now - then)
        margins.append(beta * (sides[0] - sides[1]))
    return -F.logsigmoid(torch.stack(margins)).mean().item(), (torch.stack(margins) > 0).float().mean().item()


@pytest.mark.parametrize("make", [chats, texts])
def test_losses_are_those_of_transformers(make: Any, model: Path, tmp_path: Path) -> None:
    rows, held_out = make(24), make(6)
    data = _write(tmp_path / "data", rows, held_out)
    argv = [*FIVE, "--model", str(model), "--beta", "0.3"]
    run_well(DpoLm, [*argv, "--data", str(data), "--output-dir", str(tmp_path / "run")])
    lines = training_lines(tmp_path / "run")
    assert losses(tmp_path / "run")[1] == pytest.approx(math.log(2), abs=1e-6)  # the model is the reference
    last = [line for line in lines if "eval/loss" in line][-1]
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    loss, accuracy = _expected(held_out, model, checkpoint, beta=0.3)
    assert abs(loss - math.log(2)) > 1e-3
    assert last["eval/loss"] == pytest.approx(loss, abs=1e-5)
    assert last["eval/accuracy"] == pytest.approx(accuracy)
    assert json.loads((checkpoint / "config.json").read_text())["resid_pdrop"] == 0.1
    assert not [name for name in final_tensors(tmp_path / "run") if "start" in name]
    again = evaluated(tmp_path / "run")["metrics"]
    assert {f"eval/{name}": value for name, value in again.items()}.items() <= last.items()
    if make is chats:  # the same conversations, whole and without a column of prompts
        whole_data = _write(tmp_path / "whole", [whole(row) for row in rows], [whole(row) for row in held_out])
        run_well(DpoLm, [*argv, "--data", str(whole_data), "--output-dir", str(tmp_path / "again")])
        assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_adapters_have_the_base_as_their_reference(model: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "data", chats(24), chats(6))
    argv = [*FIVE, "--model", str(model), "--data", str(data), "--lora-rank", "2"]
    one, sharded = tmp_path / "one", tmp_path / "sharded"
    run_well(DpoLm, [*argv, "--output-dir", str(one)])
    run_on_ranks(2, _run, [*argv, "--output-dir", str(sharded), "--strategy", "fsdp2"])
    expected, found = losses(one), losses(sharded)
    assert expected[1] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(expected[5] - expected[1]) > 1e-3
    assert max(abs(expected[step] - found[step]) for step in expected) < 1e-6


def test_what_is_left_out_is_said(model: Path, tmp_path: Path) -> None:
    long = {**chats(1)[0], "chosen": _answers("good " * 60)}
    same = {**chats(1)[0], "chosen": chats(1)[0]["rejected"]}
    data = _write(tmp_path / "data", [*chats(13), long, same, same], chats(3))
    argv = [*FIVE, "--model", str(model), "--data", str(data), "--output-dir", str(tmp_path / "run")]
    output = " ".join(run_well(DpoLm, argv).split())
    assert "1 of 16 pairs of the train data are longer than --context-length 96: not used" in output
    assert "2 of 16 pairs of the train data have the same answer twice: not used" in output


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ([{"prompt": "a", "chosen": "b"}] * 8, (), "the train data has no column 'rejected'"),
        ([{"chosen": "b", "rejected": "c"}] * 8, (), "need a column with their prompt"),
        ([*chats(3), {**chats(1)[0], "rejected": []}], (), "row 4 of the train data: 'rejected': no messages"),
        ([*chats(2), {**chats(1)[0], "chosen": _asks("b")}], (), "row 3 of the train data: 'chosen': no message has"),
        (
            [*chats(2), {**chats(1)[0], "chosen": [{"role": "gpt", "content": "b"}]}],
            (),
            "message 1 has the role 'gpt', which the chat template does not name",
        ),
        (chats(4), ("--context-length", "5"), "no pair of the train data can be used: 0 have the same answer twice"),
        (texts(4), ("--chat-template", "plain"), "--chat-template: the column 'chosen' has texts"),
        (chats(4), ("--chat-template", "nowhere"), "--chat-template nowhere: neither plain nor a file"),
        (chats(4), ("--init-from", "x"), "--init-from: the reference would be another model"),
        (chats(4), ("--model", ""), "--model: give the language model to tune"),
        ([{"prompt": "a", "chosen": 1, "rejected": 2}] * 8, (), "column 'chosen' must hold texts or lists of messages"),
    ],
)
def test_bad_pairs(rows: list[Any], options: tuple[str, ...], complaint: str, model: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "data", rows)
    argv = [*FIVE, "--model", str(model), "--data", str(data), "--output-dir", str(tmp_path / "run"), *options]
    status, output = run_quietly(DpoLm, argv)
    assert status == 2, output
    assert complaint in " ".join(output.split()), output
    assert not (tmp_path / "run" / "checkpoints").exists()

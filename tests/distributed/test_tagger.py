"""The tagger: its scores are seqeval's on what transformers predicts sentence by sentence."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seqeval.metrics import f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, RobertaConfig, RobertaModel

from shardlaunch.launcher.commands.predict import predict_texts
from shardlaunch.recipes.bert_tagger import BertTagger
from shardlaunch.text import train_tokenizer
from tests.recipes import run_quietly, run_well, save_small_bert, training_lines

ARGV = ["--global-batch-size", "8", "--micro-batch-size", "4", "--tracker", "none", "--threads-per-rank", "1"]
NAMES = {"Romeo": "B-PER", "Montague": "I-PER", "Verona": "B-LOC", "came": "O", "to": "O", "from": "O", ".": "O"}


def sentences(count: int, seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    return [[draw.choice([*NAMES]) for _ in range(draw.randint(2, 9))] for _ in range(count)]


def write_conll(folder: Path) -> list[list[str]]:
    """Write files as Windows does, with a byte order mark; return the sentences that are held out."""
    folder.mkdir()
    held_out = sentences(10, seed=2)
    for name, rows in (("train", sentences(48, seed=1)), ("test", held_out)):
        text = "\n\n".join("\n".join(f"{word} x {NAMES[word]}" for word in words) for words in rows)
        (folder / f"{name}.conll").write_text(text + "\n", encoding="utf-8-sig", newline="\r\n")
    return held_out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_small_bert(folder / "bert")
    words = [" ".join(words) for words in sentences(50, seed=3)]
    tokenizer = train_tokenizer(
        words, vocab_size=280, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config).save_pretrained(folder / "roberta")
    tokenizer.save_pretrained(folder / "roberta")
    return folder


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_scores_of_a_run(kind: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = write_conll(tmp_path / "data")
    argv = [*ARGV, "--model", str(models / kind), "--data", str(tmp_path / "data"), "--max-length", "30"]
    run_well(BertTagger, [*argv, "--epochs", "3", "--lr", "0.003", "--output-dir", str(tmp_path / "run")])
    last = [line for line in training_lines(tmp_path / "run") if "eval/loss" in line][-1]
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    model, info = AutoModelForTokenClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    nats, found, lines = [], [], []
    for words in held_out:
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        ids = encoded.word_ids()
        places = [ids.index(word) for word in range(len(words))]
        with torch.no_grad():
            logits = model.eval()(**encoded).logits[0, places]
        wanted = torch.tensor([model.config.label2id[NAMES[word]] for word in words])
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        found.append([model.config.id2label[number] for number in logits.argmax(-1).tolist()])
    labels = [[NAMES[word] for word in words] for words in held_out]
    assert last["eval/loss"] == pytest.approx(torch.cat(nats).mean().item(), abs=1e-5)
    assert last["eval/f1"] == pytest.approx(f1_score(labels, found))
    assert last["eval/f1"] > 0.3
    capsys.readouterr()
    predict_texts(checkpoint, texts=[" ".join(words) for words in held_out], file=None)
    for line, words, tags in zip(capsys.readouterr().out.splitlines(), held_out, found, strict=True):
        entities, _, text = line.partition("\t")
        assert text == " ".join(words)
        assert (entities == "-") == (set(tags) == {"O"})
        lines.append(entities)
    assert any("PER: Romeo Montague" in line for line in lines), lines


def test_a_long_sentence_is_divided_and_said(models: Path, tmp_path: Path) -> None:
    write_conll(tmp_path / "data")
    argv = [*ARGV, "--model", str(models / "bert"), "--data", str(tmp_path / "data"), "--max-length", "6"]
    output = run_well(BertTagger, [*argv, "--max-steps", "1", "--output-dir", str(tmp_path / "run")])
    assert "10 sentences of the eval data are longer, and divided between words" in " ".join(output.split())


@pytest.mark.parametrize(
    ("files", "options", "complaint"),
    [
        ({"train.conll": "a O\nb"}, (), "train.conll: line 2 has no word with a tag: 'b'"),
        ({"train.txt": "a O\nb B-X\n"}, (), "no column 'tokens' and no column 'tags'; it has 'text'"),
        (
            {"train-1.jsonl": {"tokens": ["a"], "tags": [1]}, "train-2.jsonl": {"tokens": ["a"], "tags": ["O"]}},
            (),
            "'tags'",
        ),
        ({"train.conll": "a O\nb B-X\n\nc O\n"}, ("--max-length", "2"), "--max-length 2: must be at least 3"),
    ],
)
def test_bad_data(files: Any, options: tuple[str, ...], complaint: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else (json.dumps(content) + "\n") * 8
        (tmp_path / "data" / name).write_text(text)
    argv = [*ARGV, "--model", str(models / "bert"), "--data", str(tmp_path / "data"), "--max-steps", "1", *options]
    status, output = run_quietly(BertTagger, [*argv, "--output-dir", str(tmp_path / "run")])
    assert (status, complaint in " ".join(output.split())) == (2, True), output

"""Run a recipe on a tiny model in this process, and compute the same losses with transformers alone, text by text."""

import contextlib
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from shardlaunch.launcher.commands.generate import Sampling, generate_texts
from shardlaunch.launcher.commands.predict import predict_texts
from tests.families.models import WORDS, save_model, save_tokenizer
from tests.recipes import recipe_class, run_quietly, training_lines

CLOSE = 1e-5
ARGV = (
    "--max-steps",
    "1",
    "--global-batch-size",
    "4",
    "--micro-batch-size",
    "4",
    "--tracker",
    "none",
    "--threads-per-rank",
    "1",
)


class Refused(Exception):
    """The recipe ended with one message at the start."""


def texts(count: int, *, seed: int, longest: int = 12) -> list[str]:
    """Return texts of words, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths]


def write_rows(folder: Path) -> None:
    """Write train.jsonl and test.jsonl with texts, labels and translations into a folder data."""
    (folder / "data").mkdir()
    for name, count, seed in (("train", 8, 1), ("test", 6, 2)):
        sources, targets = texts(count, seed=seed), texts(count, seed=seed + 10)
        rows = [
            {"text": source, "label": ("bad", "good")[number % 2], "target": target}
            for number, (source, target) in enumerate(zip(sources, targets, strict=True))
        ]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of `write_rows`."""
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]


def trained(recipe: str, argv: list[str], output_dir: Path) -> tuple[float, Path]:
    """Run a recipe for a step; return the evaluation loss and the checkpoint.

    Raises Refused with the message if it refused. All warnings about weights would be in its output.
    """
    status, output = run_quietly(recipe_class(recipe), [*ARGV, *argv, "--output-dir", str(output_dir)])
    if status == 2:
        errors = re.findall(r"^error: (.*)$", output, flags=re.MULTILINE)
        assert len(errors) == 1, output
        assert "Traceback" not in output
        raise Refused(errors[0])
    assert status == 0, output
    losses = [line["eval/loss"] for line in training_lines(output_dir) if "eval/loss" in line]
    return losses[-1], max((output_dir / "checkpoints").iterdir())


def loaded(auto_class: Any, checkpoint: Path) -> Any:
    """Load a checkpoint as any user would, and check that its weights are exactly the model's."""
    model, info = auto_class.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def classifier(family: str, folder: Path, *options: str) -> None:
    """Compare the text classification recipe on a family with transformers. Raises Refused."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = save_tokenizer(folder / "model", kind="cls", family=family)
    save_model(folder / "model", AutoModelForSequenceClassification, family, tokenizer=tokenizer)
    write_rows(folder)
    argv = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--max-length", "16", *options]
    found, checkpoint = trained("bert_imdb", argv, folder / "run")
    model = loaded(AutoModelForSequenceClassification, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = rows_of(folder, "test")
    logits = []
    with torch.no_grad():
        for row in rows:  # alone: nothing is padded
            logits.append(model(**tokenizer(row["text"], return_tensors="pt")).logits[0])
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    expected = F.cross_entropy(torch.stack(logits), labels).item()
    assert abs(found - expected) < CLOSE, (found, expected)
    predicted = _printed(predict_texts, checkpoint, texts=[row["text"] for row in rows], file=None)
    for line, row in zip(predicted.splitlines(), torch.stack(logits).softmax(dim=-1).tolist(), strict=True):
        numbers = torch.tensor([float(word) for word in re.findall(r"\d\.\d{4}", line)])
        torch.testing.assert_close(numbers, torch.tensor(row), atol=1e-4, rtol=0)


def language_model(family: str, folder: Path, *options: str) -> None:
    """Compare the language model recipe on a family with transformers, one document at a time. Raises Refused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = save_tokenizer(folder / "model", kind="plain", family=family)
    save_model(folder / "model", AutoModelForCausalLM, family, tokenizer=tokenizer)
    write_rows(folder)
    argv = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--context-length", "16", *options]
    found, checkpoint = trained("gpt_lm", argv, folder / "run")
    model = loaded(AutoModelForCausalLM, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    total, count, document_start = 0.0, 0, 0
    with torch.no_grad():
        for row in rows_of(folder, "test"):
            ids = torch.tensor([[1, *tokenizer(row["text"])["input_ids"], 2]])
            pieces = [ids]
            if "--no-packing" not in options:  # packed: a block's end divides a document
                cuts = [0, *(cut for cut in range(-document_start % 16, ids.shape[1] - 1, 16) if cut), ids.shape[1] - 1]
                pieces = [ids[:, first : last + 1] for first, last in pairwise(cuts)]
                document_start += ids.shape[1] - 1
            for piece in pieces:
                logits = model(input_ids=piece).logits[0, :-1]
                total += F.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
                count += piece.shape[1] - 1
        assert abs(found - total / count) < CLOSE, (found, total / count)
        ids = [1, *tokenizer("the film is")["input_ids"]]
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    text = tokenizer.decode(ids, skip_special_tokens=True)
    greedy = {"prompts": ["the film is"], "file": None, "max_new_tokens": 4, "sampling": Sampling(num_beams=1)}
    assert _printed(generate_texts, checkpoint, **greedy) == text + "\n"


def translator(family: str, folder: Path, *options: str) -> None:
    """Compare the encoder-decoder recipe on a family with transformers, one pair at a time. Raises Refused."""
    from transformers import AutoModelForSeq2SeqLM

    tokenizer = save_tokenizer(folder / "model", kind="end", family=family)
    save_model(folder / "model", AutoModelForSeq2SeqLM, family, tokenizer=tokenizer)
    write_rows(folder)
    compare_translator(folder, *options)


def compare_translator(folder: Path, *options: str, num_new: int = 5) -> Path:
    """Compare the encoder-decoder recipe on the model of a folder with transformers; return the checkpoint."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    columns = ["--source-column", "text", "--target-column", "target", "--num-beams", "1", "--metrics", "chrf"]
    lengths = ["--max-source-length", "62", "--max-target-length", "62"]
    argv = ["--model", str(folder / "model"), "--data", str(folder / "data"), *columns, *lengths, *options]
    found, checkpoint = trained("translate_seq2seq", argv, folder / "run")
    model = loaded(AutoModelForSeq2SeqLM, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    total, count = 0.0, 0
    rows = rows_of(folder, "test")
    with torch.no_grad():
        for row in rows:
            inputs = tokenizer(row["text"], text_target=row["target"], return_tensors="pt", return_token_type_ids=False)
            logits = model(**inputs).logits[0]  # the model shifts its labels by itself
            total += F.cross_entropy(logits, inputs["labels"][0], reduction="sum").item()
            count += inputs["labels"].numel()
        assert abs(found - total / count) < CLOSE, (found, total / count)
        inputs = tokenizer(rows[0]["text"], return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=num_new, do_sample=False, num_beams=1)[0]
    greedy = {"prompts": [rows[0]["text"]], "file": None, "max_new_tokens": num_new, "sampling": Sampling(num_beams=1)}
    assert _printed(generate_texts, checkpoint, **greedy) == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    return checkpoint


def _printed(command: Any, checkpoint: Path, **options: Any) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        command(checkpoint, **options)
    return output.getvalue()

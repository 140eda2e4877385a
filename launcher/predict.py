"""Prediction with a checkpoint of a text classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.layout import RECIPE
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.errors import UserError
from shardlaunch.launcher.display import Display
from shardlaunch.launcher.run_folder import open_path

TEXTS_AT_ONCE = 32


def predict_texts(path: Path, *, texts: Sequence[str], file: Path | None) -> None:
    """Print, for each text, its label and all probabilities.

    Raises UserError when there is no text, or no valid checkpoint of a text classifier.
    """
    texts = all_texts(texts, file, flag="--text")
    checkpoint, tokenizer = open_text_model(path, kind="text classifier")
    from transformers import AutoModelForSequenceClassification

    folder = checkpoint.step_dir
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    max_length = checkpoint.read_json(RECIPE)["options"].get("max_length")
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = texts[first : first + TEXTS_AT_ONCE]
        inputs = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**inputs).logits.float().softmax(dim=-1)
        for text, row in zip(chunk, probabilities, strict=True):
            shares = "  ".join(f"{label} {share:.4f}" for label, share in zip(labels, row.tolist(), strict=True))
            print(f"{labels[int(row.argmax())]}\t{shares}\t{text}")


def all_texts(texts: Sequence[str], file: Path | None, *, flag: str) -> list[str]:
    """Return the texts that were given, and those of a file with one a line. Raises UserError when there is none."""
    try:
        lines = file.read_text().splitlines() if file is not None else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {file}: not readable: {error}") from error
    found = [*texts, *(line for line in lines if line.strip())]
    if not found:
        raise UserError(f'no text: give {flag} "..." or --file PATH')
    return found


def open_text_model(path: Path, *, kind: str) -> tuple[Checkpoint, Any]:
    """Return the checkpoint that a path means and its tokenizer. Raises UserError when it has none."""
    checkpoint = open_path(path, peers=Peers(), display=Display(silent=False))
    if not (checkpoint.step_dir / "tokenizer_config.json").exists():
        name = checkpoint.read_json(RECIPE)["recipe"]
        raise UserError(f"{checkpoint.step_dir}: a checkpoint of {name}, which is no {kind}: it has no tokenizer")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return checkpoint, AutoTokenizer.from_pretrained(checkpoint.step_dir)

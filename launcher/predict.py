"""Prediction with a checkpoint of a text classifier."""

from collections.abc import Sequence
from pathlib import Path

import torch

from shardlaunch.checkpoints.layout import RECIPE
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.errors import UserError
from shardlaunch.launcher.display import Display
from shardlaunch.launcher.run_folder import open_path

TEXTS_AT_ONCE = 32


def predict_texts(path: Path, *, texts: Sequence[str], file: Path | None) -> None:
    """Print, for each text, its label and all probabilities.

    Raises UserError when there is no text, or no valid checkpoint of a text classifier.
    """
    texts = [*texts, *(_lines(file) if file is not None else ())]
    if not texts:
        raise UserError('no text: give --text "..." or --file PATH')
    checkpoint = open_path(path, peers=Peers(), display=Display(silent=False))
    folder = checkpoint.step_dir
    if not (folder / "tokenizer_config.json").exists():
        name = checkpoint.read_json(RECIPE)["recipe"]
        raise UserError(f"{folder}: a checkpoint of {name}, which is no text classifier: it has no tokenizer")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
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


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {file}: not readable: {error}") from error

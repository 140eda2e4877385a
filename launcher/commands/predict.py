"""`shardlaunch predict`: predictions of a text classification checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch

from shardlaunch.errors import UserError, printable
from shardlaunch.launcher.commands.adapters import model_of
from shardlaunch.launcher.commands.text_models import all_texts, in_use, open_text_model
from shardlaunch.launcher.toolkit.families import CLASSIFIERS

BATCH_SIZE = 32


def predict_texts(path: Path, *, texts: Sequence[str], file: Path | None, ema: bool = False) -> None:
    """Print each text's label and all probabilities, or the predicted number of a regression.

    With `ema`, the model has the average of the weights that its run has kept.
    Raises UserError when there is no text, or no valid checkpoint of a text classifier.
    """
    texts = all_texts(texts, file, flag="--text")
    checkpoint, tokenizer = open_text_model(path, kind="text classifier")
    from transformers import AutoModelForSequenceClassification

    model = model_of(checkpoint, AutoModelForSequenceClassification, kind="text classifier", ema=ema)
    max_length = checkpoint.recipe.options.get("max_length")
    if not (max_length is None or (type(max_length) is int and max_length > 0)):
        raise UserError(f"{checkpoint.step_dir}: its recipe.json has the max_length {max_length!r}")
    is_regression = model.config.problem_type == "regression"
    names = (model.config.id2label.get(number, number) for number in range(model.config.num_labels))
    labels = [printable(str(name), is_name=True) for name in names]
    size = BATCH_SIZE if model.config.model_type in CLASSIFIERS else 1  # padding may change what others predict
    for first in range(0, len(texts), size):
        chunk = texts[first : first + size]
        with torch.no_grad(), in_use(checkpoint):
            inputs = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            logits = model(**inputs).logits.float()
            rows = (logits[:, 0] if is_regression else logits.softmax(dim=-1)).tolist()
        for text, row in zip(chunk, rows, strict=True):
            found = f"{row:.4f}" if is_regression else _classes(labels, row)
            print(f"{found}\t{printable(text, is_name=True)}")  # each text on its line, in its column


def _classes(labels: Sequence[str], probabilities: Sequence[float]) -> str:
    """Return the most probable label and all probabilities."""
    best = max(range(len(labels)), key=lambda number: probabilities[number])
    listed = "  ".join(f"{label} {value:.4f}" for label, value in zip(labels, probabilities, strict=True))
    return f"{labels[best]}\t{listed}"

"""`shardlaunch predict`: predictions of a text classification checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch

from shardlaunch.errors import UserError, printable
from shardlaunch.launcher.commands.text_models import all_texts, open_text_model, whole_model

BATCH_SIZE = 32


def predict_texts(path: Path, *, texts: Sequence[str], file: Path | None) -> None:
    """Print each text's label and all probabilities, or the predicted number of a regression.

    Raises UserError when there is no text, or no valid checkpoint of a text classifier.
    """
    texts = all_texts(texts, file, flag="--text")
    checkpoint, tokenizer = open_text_model(path, kind="text classifier")
    from transformers import AutoModelForSequenceClassification

    model = whole_model(checkpoint, AutoModelForSequenceClassification, kind="text classifier")
    max_length = checkpoint.recipe.options.get("max_length")
    if not (max_length is None or (type(max_length) is int and max_length > 0)):
        raise UserError(f"{checkpoint.step_dir}: its recipe.json has the max_length {max_length!r}")
    is_regression = model.config.problem_type == "regression"
    names = (model.config.id2label.get(number, number) for number in range(model.config.num_labels))
    labels = [printable(str(name), is_name=True) for name in names]
    for first in range(0, len(texts), BATCH_SIZE):
        chunk = texts[first : first + BATCH_SIZE]
        inputs = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits.float()
        shown = [printable(text, is_name=True) for text in chunk]  # each on its line, in its column
        for text, row in zip(shown, logits if is_regression else logits.softmax(dim=-1), strict=True):
            if is_regression:
                print(f"{row.item():.4f}\t{text}")
                continue
            probabilities = "  ".join(f"{label} {value:.4f}" for label, value in zip(labels, row.tolist(), strict=True))
            print(f"{labels[int(row.argmax())]}\t{probabilities}\t{text}")

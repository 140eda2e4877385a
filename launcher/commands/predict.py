"""Prediction with a checkpoint of a text classifier."""

from collections.abc import Sequence
from pathlib import Path

import torch

from shardlaunch.checkpoints.layout import RECIPE
from shardlaunch.launcher.commands.text_models import all_texts, open_text_model, whole_model

TEXTS_AT_ONCE = 32


def predict_texts(path: Path, *, texts: Sequence[str], file: Path | None) -> None:
    """Print, for each text, its label and all probabilities, or the number that a regression predicts.

    Raises UserError when there is no text, or no valid checkpoint of a text classifier.
    """
    texts = all_texts(texts, file, flag="--text")
    checkpoint, tokenizer = open_text_model(path, kind="text classifier")
    from transformers import AutoModelForSequenceClassification

    folder = checkpoint.step_dir
    model = whole_model(folder, AutoModelForSequenceClassification, kind="text classifier")
    max_length = checkpoint.read_json(RECIPE)["options"].get("max_length")
    is_regression = model.config.problem_type == "regression"
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = texts[first : first + TEXTS_AT_ONCE]
        inputs = tokenizer(chunk, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits.float()
        for text, row in zip(chunk, logits if is_regression else logits.softmax(dim=-1), strict=True):
            if is_regression:
                print(f"{row.item():.4f}\t{text}")
                continue
            shares = "  ".join(f"{label} {share:.4f}" for label, share in zip(labels, row.tolist(), strict=True))
            print(f"{labels[int(row.argmax())]}\t{shares}\t{text}")

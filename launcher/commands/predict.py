"""`shardlaunch predict`: predictions of a text classification checkpoint, of texts or of the rows of a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.errors import UserError, printable
from shardlaunch.launcher.commands.adapters import model_of
from shardlaunch.launcher.commands.text_models import all_texts, in_use, loaded, open_text_model
from shardlaunch.launcher.toolkit.families import CLASSIFIERS

BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A text classifier, or a regression, of a checkpoint."""

    checkpoint: Checkpoint
    tokenizer: Any
    model: Any
    max_length: int | None

    @property
    def is_regression(self) -> bool:
        return bool(self.model.config.problem_type == "regression")

    @property
    def has_several_labels(self) -> bool:
        """Return whether a text may have any number of labels, each with a probability of its own."""
        return bool(self.model.config.problem_type == "multi_label_classification")

    @property
    def labels(self) -> list[str]:
        """Return the names of the classes by number."""
        config = self.model.config
        return [str(config.id2label.get(number, number)) for number in range(config.num_labels)]

    def predictions(self, texts: Sequence[str]) -> Iterator[list[float]]:
        """Yield the probabilities of each text's classes, or the one number that a regression predicts."""
        size = (
            BATCH_SIZE if self.model.config.model_type in CLASSIFIERS else 1
        )  # padding may change what others predict
        for first in range(0, len(texts), size):
            chunk = list(texts[first : first + size])
            with torch.no_grad(), in_use(self.checkpoint):
                inputs = self.tokenizer(
                    chunk, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
                )
                logits = self.model(**inputs).logits.float()
                if self.is_regression:
                    yield from logits[:, :1].tolist()
                else:
                    yield from (logits.sigmoid() if self.has_several_labels else logits.softmax(dim=-1)).tolist()

    def chosen(self, probabilities: Sequence[float]) -> list[str]:
        """Return the most probable class; of several labels those that are more probable than not."""
        if self.has_several_labels:
            return [label for label, value in zip(self.labels, probabilities, strict=True) if value > 0.5]
        return [self.labels[max(range(len(probabilities)), key=probabilities.__getitem__)]]


def open_classifier(path: Path, *, ema: bool) -> Classifier:
    """Return the text classifier of a checkpoint, with `ema` with the average of its weights.

    Raises UserError where there is no valid checkpoint of a text classifier.
    """
    return _classifier(*open_text_model(path, kind="text classifier"), ema=ema)


def _tags_words(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint's model tags words."""
    from transformers import AutoConfig

    architectures = loaded(checkpoint, AutoConfig, kind="text classifier").architectures
    return isinstance(architectures, list) and str(*architectures[:1]).endswith("ForTokenClassification")


def _classifier(checkpoint: Checkpoint, tokenizer: Any, *, ema: bool) -> Classifier:
    from transformers import AutoModelForSequenceClassification

    model = model_of(checkpoint, AutoModelForSequenceClassification, kind="text classifier", ema=ema)
    max_length = checkpoint.recipe.options.get("max_length")
    if not (max_length is None or (type(max_length) is int and max_length > 0)):
        raise UserError(f"{checkpoint.step_dir}: its recipe.json has the max_length {max_length!r}")
    return Classifier(checkpoint=checkpoint, tokenizer=tokenizer, model=model, max_length=max_length)


def predict_texts(path: Path, *, texts: Sequence[str], file: Path | None, ema: bool = False) -> None:
    """Print each text's label and all probabilities, the predicted number of a regression, or entities.

    With `ema`, the model has the average of the weights that its run has kept.
    Raises UserError when there is no text, or no valid checkpoint of a text classifier.
    """
    texts = all_texts(texts, file, flag="--text")
    checkpoint, tokenizer = open_text_model(path, kind="text classifier")
    if _tags_words(checkpoint):
        from shardlaunch.launcher.commands.predict_tags import print_tags

        print_tags(checkpoint, tokenizer, texts, ema=ema)
        return
    classifier = _classifier(checkpoint, tokenizer, ema=ema)
    labels = [printable(name, is_name=True) for name in classifier.labels]
    for text, row in zip(texts, classifier.predictions(texts), strict=True):
        chosen = [] if classifier.is_regression else classifier.chosen(row)
        found = f"{row[0]:.4f}" if classifier.is_regression else _classes(chosen, labels, row)
        print(f"{found}\t{printable(text, is_name=True)}")  # each text on its line, in its column


def _classes(chosen: Sequence[str], labels: Sequence[str], probabilities: Sequence[float]) -> str:
    """Return what is chosen, - if that is nothing, and all probabilities."""
    listed = "  ".join(f"{label} {value:.4f}" for label, value in zip(labels, probabilities, strict=True))
    return f"{', '.join(printable(name, is_name=True) for name in chosen) or '-'}\t{listed}"

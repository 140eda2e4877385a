"""Metrics of torchmetrics by name: exact across ranks, each knows whether higher is better."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardlaunch.errors import UserError

Build = Callable[[int], Any]  # builds a metric, given the number of classes


def _classification(kind: str, **options: Any) -> Build:
    def build(num_classes: int) -> Any:
        from torchmetrics import classification

        return getattr(classification, f"Multiclass{kind}")(num_classes, **options)

    return build


def _multi_label(kind: str, **options: Any) -> Build:
    def build(num_classes: int) -> Any:
        from torchmetrics import classification

        return getattr(classification, f"Multilabel{kind}")(num_classes, **options)

    return build


def _regression(kind: str) -> Build:
    def build(num_classes: int) -> Any:
        from torchmetrics import regression

        base: Any = getattr(regression, kind)

        class InDouble(base):
            # In fp32, squares of large and nearly equal numbers would lose their differences.
            def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
                super().update(predictions.double(), targets.double())

        return InDouble().set_dtype(torch.float64)

    return build


CLASSIFICATION: Mapping[str, Build] = {
    "accuracy": _classification("Accuracy", average="micro"),
    "accuracy_macro": _classification("Accuracy", average="macro"),
    "precision_macro": _classification("Precision", average="macro"),
    "precision_micro": _classification("Precision", average="micro"),
    "recall_macro": _classification("Recall", average="macro"),
    "recall_micro": _classification("Recall", average="micro"),
    "f1_macro": _classification("F1Score", average="macro"),
    "f1_micro": _classification("F1Score", average="micro"),
    "confusion_matrix": _classification("ConfusionMatrix"),
}
MULTI_LABEL: Mapping[str, Build] = {
    "f1_micro": _multi_label("F1Score", average="micro"),
    "f1_macro": _multi_label("F1Score", average="macro"),
    "precision_micro": _multi_label("Precision", average="micro"),
    "recall_micro": _multi_label("Recall", average="micro"),
    "exact_match": _multi_label("ExactMatch"),
    "f1_per_label": _multi_label("F1Score", average=None),
}
REGRESSION: Mapping[str, Build] = {
    "mse": _regression("MeanSquaredError"),
    "mae": _regression("MeanAbsoluteError"),
    "r2": _regression("R2Score"),
}
METRICS = {**CLASSIFICATION, **REGRESSION}


def _text(kind: str, name: str) -> Callable[[], Any]:
    def build() -> Any:
        from shardlaunch.launcher.toolkit import text_metrics

        return getattr(text_metrics, kind)(name)

    return build


TEXT_METRICS: Mapping[str, Callable[[], Any]] = {
    "bleu": _text("CorpusScore", "BLEU"),
    "chrf": _text("CorpusScore", "CHRF"),
    "rouge1": _text("RougeScore", "rouge1"),
    "rouge2": _text("RougeScore", "rouge2"),
    "rougeL": _text("RougeScore", "rougeL"),
}


def named_metrics(
    *names: str,
    num_classes: int = 0,
    among: Mapping[str, Build] = METRICS,
) -> dict[str, Any]:
    """Return torchmetrics metrics by name: accuracy, f1_macro, confusion_matrix, mse, r2, ... (`METRICS`).

    They are updated as in torchmetrics: with logits or classes and labels; for regression with predictions and targets;
    for several labels per row (`among=MULTI_LABEL`) with probabilities, and 0 or 1.
    Sums are counts or computed in float64. Raises UserError for an unknown name, and for fewer than two classes.
    """
    for name in names:
        if name not in among:
            raise UserError(f"unknown metric {name!r}; available: {', '.join(among)}")
        if name in CLASSIFICATION and num_classes < 2:
            raise UserError(f"metric {name!r}: num_classes is {num_classes}; at least two classes are required")
    return {name: among[name](num_classes) for name in names}


def text_metrics(*names: str) -> dict[str, Any]:
    """Return metrics of generated texts by name (`TEXT_METRICS`). Raises UserError for an unknown name."""
    for name in names:
        if name not in TEXT_METRICS:
            raise UserError(f"unknown metric {name!r}; available: {', '.join(TEXT_METRICS)}")
    return {name: TEXT_METRICS[name]() for name in names}

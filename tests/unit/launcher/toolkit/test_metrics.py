"""Metrics by name."""

import pytest
import torch
import torch.nn.functional as F

from shardlaunch import UserError
from shardlaunch.launcher.toolkit.metrics import CLASSIFICATION, METRICS, REGRESSION
from shardlaunch.metrics import named_metrics


def test_classification() -> None:
    labels, found = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    metrics = named_metrics(*CLASSIFICATION, num_classes=3)
    values = {}
    for name, metric in metrics.items():
        for half in (slice(0, 2), slice(2, 4)):
            metric.update(F.one_hot(found[half], 3).float(), labels[half])
        values[name] = metric.compute().tolist()
    assert values == {
        "accuracy": pytest.approx(2 / 4),
        "accuracy_macro": pytest.approx((1 / 2 + 1 + 0) / 3),
        "precision_macro": pytest.approx((1 + 1 / 3 + 0) / 3),
        "precision_micro": pytest.approx(2 / 4),
        "recall_macro": pytest.approx((1 / 2 + 1 + 0) / 3),
        "recall_micro": pytest.approx(2 / 4),
        "f1_macro": pytest.approx((2 / 3 + 1 / 2 + 0) / 3),
        "f1_micro": pytest.approx(2 / 4),
        "confusion_matrix": [[1, 1, 0], [0, 1, 0], [0, 1, 0]],
    }
    assert all(metric.higher_is_better for name, metric in metrics.items() if name != "confusion_matrix")


def test_regression() -> None:
    metrics = named_metrics(*REGRESSION)
    for metric in metrics.values():
        metric.update(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0]))
    assert {name: metric.compute().item() for name, metric in metrics.items()} == {
        "mse": pytest.approx(5 / 3),
        "mae": pytest.approx(1.0),
        "r2": pytest.approx(1 - 5 / 2),
    }
    assert [metric.higher_is_better for metric in metrics.values()] == [False, False, True]


def test_regression_of_large_numbers_close_together() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 1e5 + 5 * torch.randn(200, generator=generator)
    predictions = targets + 3 * torch.randn(200, generator=generator)
    metric = named_metrics("r2")["r2"]
    for half in (slice(0, 100), slice(100, 200)):
        metric.update(predictions[half], targets[half])
    wide = targets.double()
    expected = 1 - ((predictions.double() - wide) ** 2).sum() / ((wide - wide.mean()) ** 2).sum()
    assert metric.compute().item() == pytest.approx(expected.item())


def test_a_single_class() -> None:
    with pytest.raises(UserError, match="metric 'accuracy': num_classes is 1; at least two classes are required"):
        named_metrics("accuracy", num_classes=1)


def test_an_unknown_metric() -> None:
    with pytest.raises(UserError, match=f"unknown metric 'f2'; available: {', '.join(METRICS)}"):
        named_metrics("accuracy", "f2", num_classes=2)

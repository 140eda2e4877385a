"""Metrics for classification, regression, language models and generated texts, exact on any number of ranks."""

from typing import TYPE_CHECKING, Any

from shardlaunch.launcher.toolkit.metrics import (
    CLASSIFICATION,
    REGRESSION,
    TEXT_METRICS,
    named_metrics,
    text_metrics,
)

if TYPE_CHECKING:
    from shardlaunch.launcher.toolkit.text_metrics import BitsPer, Perplexity

__all__ = [
    "CLASSIFICATION",
    "REGRESSION",
    "TEXT_METRICS",
    "BitsPer",
    "Perplexity",
    "named_metrics",
    "text_metrics",
]


def __getattr__(name: str) -> Any:
    """Import the classes on first use: torchmetrics takes longer to import than torch."""
    if name not in ("BitsPer", "Perplexity"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shardlaunch.launcher.toolkit import text_metrics as classes

    return getattr(classes, name)

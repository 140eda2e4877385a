"""Metrics for classification, regression, language models and generated texts, exact on any number of ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardlaunch.launcher.toolkit.metrics import (
    CLASSIFICATION,
    MULTI_LABEL,
    REGRESSION,
    TEXT_METRICS,
    named_metrics,
    text_metrics,
)

if TYPE_CHECKING:
    from shardlaunch.launcher.toolkit.retrieval_metrics import retrieval_metrics
    from shardlaunch.launcher.toolkit.span_metrics import SpanScore
    from shardlaunch.launcher.toolkit.tag_metrics import tag_metrics
    from shardlaunch.launcher.toolkit.text_metrics import BitsPer, Perplexity

__all__ = [
    "CLASSIFICATION",
    "MULTI_LABEL",
    "REGRESSION",
    "TEXT_METRICS",
    "BitsPer",
    "Perplexity",
    "SpanScore",
    "named_metrics",
    "retrieval_metrics",
    "tag_metrics",
    "text_metrics",
]


_MODULES = {
    "BitsPer": "text_metrics",
    "Perplexity": "text_metrics",
    "SpanScore": "span_metrics",
    "retrieval_metrics": "retrieval_metrics",
    "tag_metrics": "tag_metrics",
}


def __getattr__(name: str) -> Any:
    """Import these on first use: torchmetrics takes longer to import than torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"shardlaunch.launcher.toolkit.{_MODULES[name]}"), name)

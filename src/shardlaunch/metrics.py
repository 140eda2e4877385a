"""Metrics that are exact on any number of ranks: classification, regression, language models, generated texts."""

from shardlaunch.launcher.toolkit.metrics import CLASSIFICATION, REGRESSION, named_metrics
from shardlaunch.launcher.toolkit.text_metrics import TEXT_METRICS, BitsPer, Perplexity, text_metrics

__all__ = [
    "CLASSIFICATION",
    "REGRESSION",
    "TEXT_METRICS",
    "BitsPer",
    "Perplexity",
    "named_metrics",
    "text_metrics",
]

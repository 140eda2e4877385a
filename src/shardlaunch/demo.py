"""Models and data for machines without a hub: of PyPI packages, or made up by a grammar."""

from shardlaunch.launcher.toolkit.demo_data import CLASSES, DEMO, bert_dir, digits, film_reviews
from shardlaunch.launcher.toolkit.demo_translation import toy_translations

__all__ = ["CLASSES", "DEMO", "bert_dir", "digits", "film_reviews", "toy_translations"]

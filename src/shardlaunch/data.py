"""Data sets from the Hub or from files, their columns and classes; stored weights."""

from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.columns import class_names, class_weights, column_kinds, require_texts, select_columns
from shardlaunch.launcher.toolkit.datasets import load_splits
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.files import FileOptions
from shardlaunch.launcher.toolkit.mixture import Mixture, load_sources, mixed, of_training, role_of
from shardlaunch.launcher.toolkit.multi_labels import labels_of_columns, labels_of_lists, require_columns
from shardlaunch.launcher.toolkit.shards.dataset import Shards, load_shards
from shardlaunch.launcher.toolkit.stored_weights import stored_weights

__all__ = [
    "ColumnKind",
    "FileOptions",
    "Mixture",
    "Shards",
    "class_names",
    "class_weights",
    "column_kinds",
    "derived",
    "labels_of_columns",
    "labels_of_lists",
    "load_shards",
    "load_sources",
    "load_splits",
    "mixed",
    "of_training",
    "require_columns",
    "require_texts",
    "role_of",
    "select_columns",
    "stored_weights",
]

"""One run, any shards: train PyTorch models so that ranks, strategy, crash and resume do not change the run."""

from shardlaunch.errors import UserError
from shardlaunch.launcher import demo_data
from shardlaunch.launcher.data import (
    TensorData,
    class_names,
    class_weights,
    derived,
    load_splits,
    padded,
    select_columns,
)
from shardlaunch.launcher.generation import generate
from shardlaunch.launcher.launch import launch
from shardlaunch.launcher.metrics import named_metrics
from shardlaunch.launcher.optimizers import decay_groups
from shardlaunch.launcher.options import Options, option
from shardlaunch.launcher.pretrained import from_source, longest_input, pretrained_weights, tokenizer_key
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.schedules import constant, cosine, linear, one_cycle
from shardlaunch.launcher.text_metrics import TEXT_METRICS, text_metrics
from shardlaunch.launcher.tokenizers import train_tokenizer
from shardlaunch.launcher.toy_translation import toy_translations

__all__ = [
    "TEXT_METRICS",
    "Options",
    "Recipe",
    "TensorData",
    "UserError",
    "class_names",
    "class_weights",
    "constant",
    "cosine",
    "decay_groups",
    "demo_data",
    "derived",
    "from_source",
    "generate",
    "launch",
    "linear",
    "load_splits",
    "longest_input",
    "named_metrics",
    "one_cycle",
    "option",
    "padded",
    "pretrained_weights",
    "select_columns",
    "text_metrics",
    "tokenizer_key",
    "toy_translations",
    "train_tokenizer",
]

"""One run, any shards: train PyTorch models so that ranks, strategy, crash and resume do not change the run."""

from shardlaunch.errors import UserError
from shardlaunch.launcher import demo_data, images
from shardlaunch.launcher.data import (
    TensorData,
    class_names,
    class_weights,
    derived,
    load_splits,
    padded,
    require_texts,
    select_columns,
)
from shardlaunch.launcher.generate_together import generate, set_search
from shardlaunch.launcher.images import ImageOptions
from shardlaunch.launcher.language_metrics import BitsPer, Perplexity
from shardlaunch.launcher.launch import launch
from shardlaunch.launcher.metrics import CLASSIFICATION, REGRESSION, named_metrics
from shardlaunch.launcher.optimizers import decay_groups
from shardlaunch.launcher.options import Options, flag, option
from shardlaunch.launcher.packing import cut_blocks, pack, positions, tokenized
from shardlaunch.launcher.pretrained import (
    causal_config,
    from_config,
    from_source,
    longest_input,
    pretrained_weights,
    require_room,
    tokenizer_key,
)
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.schedules import constant, cosine, linear, one_cycle
from shardlaunch.launcher.stored_weights import stored_weights
from shardlaunch.launcher.text_metrics import TEXT_METRICS, text_metrics
from shardlaunch.launcher.tokenizers import train_tokenizer
from shardlaunch.launcher.toy_translation import toy_translations

__all__ = [
    "CLASSIFICATION",
    "REGRESSION",
    "TEXT_METRICS",
    "BitsPer",
    "ImageOptions",
    "Options",
    "Perplexity",
    "Recipe",
    "TensorData",
    "UserError",
    "causal_config",
    "class_names",
    "class_weights",
    "constant",
    "cosine",
    "cut_blocks",
    "decay_groups",
    "demo_data",
    "derived",
    "flag",
    "from_config",
    "from_source",
    "generate",
    "images",
    "launch",
    "linear",
    "load_splits",
    "longest_input",
    "named_metrics",
    "one_cycle",
    "option",
    "pack",
    "padded",
    "positions",
    "pretrained_weights",
    "require_room",
    "require_texts",
    "select_columns",
    "set_search",
    "stored_weights",
    "text_metrics",
    "tokenized",
    "tokenizer_key",
    "toy_translations",
    "train_tokenizer",
]

"""One run, any shards: train PyTorch models so that ranks, strategy, crash and resume do not change the run."""

from shardlaunch.errors import UserError
from shardlaunch.launcher import demo_data
from shardlaunch.launcher.data import TensorData, class_names, derived, load_splits, require_columns
from shardlaunch.launcher.launch import launch
from shardlaunch.launcher.optimizers import decay_groups
from shardlaunch.launcher.options import Options, option
from shardlaunch.launcher.pretrained import from_source, pretrained_weights
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.schedules import constant, linear

__all__ = [
    "Options",
    "Recipe",
    "TensorData",
    "UserError",
    "class_names",
    "constant",
    "decay_groups",
    "demo_data",
    "derived",
    "from_source",
    "launch",
    "linear",
    "load_splits",
    "option",
    "pretrained_weights",
    "require_columns",
]

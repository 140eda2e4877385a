"""One run, any shards: train PyTorch models so that ranks, strategy, crash and resume do not change the run."""

from shardlaunch.errors import UserError
from shardlaunch.launcher.data import TensorData
from shardlaunch.launcher.launch import launch
from shardlaunch.launcher.options import Options, option
from shardlaunch.launcher.recipe import Recipe

__all__ = ["Options", "Recipe", "TensorData", "UserError", "launch", "option"]

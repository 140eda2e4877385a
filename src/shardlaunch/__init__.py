"""One run, any shards: train PyTorch models so that ranks, strategy, crash and resume do not change the run.

Topic modules hold what recipes use besides: `shardlaunch.data`, `.images`, `.text`, `.metrics`, `.demo`.
"""

from shardlaunch.errors import UserError
from shardlaunch.launcher.launch import launch
from shardlaunch.launcher.options import Options, option
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.tensor_data import TensorData

__all__ = ["Options", "Recipe", "TensorData", "UserError", "launch", "option"]

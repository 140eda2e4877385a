"""One run, any shards: train PyTorch models so that ranks, strategy, crash and resume do not change the run.

Topic modules hold what recipes use besides: `shardlaunch.data`, `.images`, `.text`, `.metrics`, `.demo`.
"""

from typing import TYPE_CHECKING, Any

from shardlaunch.errors import UserError
from shardlaunch.launcher.launch import launch
from shardlaunch.launcher.options import Options, option
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.tensor_data import TensorData

if TYPE_CHECKING:
    from shardlaunch.launcher.commands.start import start
    from shardlaunch.launcher.runs.fit import fit

__all__ = ["Options", "Recipe", "TensorData", "UserError", "fit", "launch", "option", "start"]


def __getattr__(name: str) -> Any:
    """Import `fit` and `start` when they are asked for: a command line that is only read needs neither."""
    if name == "fit":
        from shardlaunch.launcher.runs.fit import fit

        return fit
    if name == "start":
        from shardlaunch.launcher.commands.start import start

        return start
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

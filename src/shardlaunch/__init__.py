"""One run, any shards: train PyTorch models so that ranks, strategy, crashes and resumes do not change the results.

Topic modules have what recipes also use: `shardlaunch.data`, `.orders`, `.images`, `.sounds`, `.text`, `.metrics`,
`.demo`.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlaunch.errors import UserError
    from shardlaunch.launcher.callbacks import Callback, Event, main_only
    from shardlaunch.launcher.commands.start import start
    from shardlaunch.launcher.launch import launch
    from shardlaunch.launcher.options import Options, option
    from shardlaunch.launcher.recipe import Recipe
    from shardlaunch.launcher.runs.fit import fit
    from shardlaunch.launcher.step import Step
    from shardlaunch.launcher.tensor_data import TensorData

__all__ = [
    "Callback",
    "Event",
    "Options",
    "Recipe",
    "Step",
    "TensorData",
    "UserError",
    "fit",
    "launch",
    "main_only",
    "option",
    "start",
]

# Where torchao is installed, transformers imports it, and it warns of its libraries for GPUs on a machine without, and
# of an interface of PyTorch that it still uses.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# Imported on first use, so that `shardlaunch --help` does not wait for torch.
_HOMES = {
    "Callback": "launcher.callbacks",
    "Event": "launcher.callbacks",
    "Options": "launcher.options",
    "Recipe": "launcher.recipe",
    "Step": "launcher.step",
    "TensorData": "launcher.tensor_data",
    "UserError": "errors",
    "fit": "launcher.runs.fit",
    "launch": "launcher.launch",
    "main_only": "launcher.callbacks",
    "option": "launcher.options",
    "start": "launcher.commands.start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

"""Orders of training samples, for `Recipe.order`: weighted, balanced, P x K, curriculum, by blocks, your own."""

from shardlaunch.launcher.order import Order
from shardlaunch.launcher.training.block_orders import blockwise
from shardlaunch.launcher.training.orders import (
    balanced,
    curriculum,
    own,
    per_class,
    repeated,
    sequential,
    weighted,
)

__all__ = ["Order", "balanced", "blockwise", "curriculum", "own", "per_class", "repeated", "sequential", "weighted"]

"""Orders of training samples, for `Recipe.order`: weighted, balanced, some classes per batch, curriculum, your own."""

from shardlaunch.launcher.order import Order
from shardlaunch.launcher.training.orders import (
    balanced,
    curriculum,
    own,
    per_class,
    repeated,
    sequential,
    weighted,
)

__all__ = ["Order", "balanced", "curriculum", "own", "per_class", "repeated", "sequential", "weighted"]

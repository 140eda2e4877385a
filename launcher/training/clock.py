"""Tell a recipe where its run is."""

from dataclasses import dataclass
from functools import lru_cache

from shardlaunch.launcher.recipe import Moment, Recipe


@lru_cache(maxsize=4)  # a step is loaded, then trained
def _moment(step: int, epoch: int, num_steps: int, is_evaluation: bool) -> Moment:
    return Moment(step=step, epoch=epoch, num_steps=num_steps, is_evaluation=is_evaluation)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Sets a recipe's `moment`."""

    recipe: Recipe
    steps_per_epoch: int
    num_steps: int

    def at(self, step: int, *, is_evaluation: bool = False) -> Moment:
        """Return the moment of a step (from 0), or of the evaluation after `step` steps."""
        return _moment(step, step // self.steps_per_epoch, self.num_steps, is_evaluation)

    def set(self, step: int, *, is_evaluation: bool = False) -> None:
        """Set the recipe's moment."""
        self.recipe.moment = self.at(step, is_evaluation=is_evaluation)

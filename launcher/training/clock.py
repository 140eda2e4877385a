"""Tell a recipe where its run is."""

from dataclasses import dataclass

from shardlaunch.launcher.recipe import Moment, Recipe


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Sets a recipe's `moment`."""

    recipe: Recipe
    steps_per_epoch: int
    num_steps: int

    def at(self, step: int, *, is_evaluation: bool = False) -> Moment:
        """Return the moment of a step (from 0), or of the evaluation after `step` steps."""
        return Moment(
            step=step, epoch=step // self.steps_per_epoch, num_steps=self.num_steps, is_evaluation=is_evaluation
        )

    def set(self, step: int, *, is_evaluation: bool = False) -> None:
        """Set the recipe's moment."""
        self.recipe.moment = self.at(step, is_evaluation=is_evaluation)

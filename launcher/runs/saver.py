"""Checkpoints of a run: when one is saved, which old ones are deleted, and what a failed save means."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.layout import RECIPE, step_dir_name
from shardlaunch.checkpoints.records import Position, to_json
from shardlaunch.checkpoints.retention import prune
from shardlaunch.checkpoints.writer import save
from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.runs.assembly import Assembly
from shardlaunch.launcher.runs.identity import Identity, option_values
from shardlaunch.launcher.runs.model_card import CARD, CardFacts, model_card
from shardlaunch.sharding.environment import report_checkpoint
from shardlaunch.sharding.named_state import group_hyperparameters
from shardlaunch.sharding.world import World


class Saver:
    """Saves the checkpoints of a run and deletes old ones."""

    def __init__(
        self,
        checkpoints_dir: Path,
        *,
        recipe: Recipe,
        identity: Identity,
        world: World,
        num_samples: Mapping[str, int],
        newest_evaluation: Callable[[], Mapping[str, Any]],
        before_save: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        self._checkpoints_dir = checkpoints_dir
        self._recipe = recipe
        self._identity = identity
        self._world = world
        self._num_samples = num_samples
        self._newest_evaluation = newest_evaluation
        self._before_save = before_save
        self._warn = warn
        self.last_saved: Path | None = None

    def save(self, position: Position, assembly: Assembly) -> None:
        """Save a checkpoint; a save that fails is dropped on all ranks, and the run goes on. All ranks."""
        position.group_hyperparameters = group_hyperparameters(assembly.strategy.optimizer)
        is_new = not (self._checkpoints_dir / step_dir_name(position.step)).exists()
        try:
            self._world.peers.together(self._before_save)
            self.last_saved = save(
                self._checkpoints_dir,
                position=position,
                state=assembly.strategy.state(),
                export=lambda folder: self._export(folder, position.step, assembly),
                aliases=assembly.aliases,
                peers=self._world.peers,
            )
        except UserError as error:
            self._warn(str(error))
            return
        if is_new and self._world.is_local_main:
            report_checkpoint()
        if self._world.is_main:
            self._prune(position)

    def require_saved(self, step: int) -> None:
        """Raise UserError unless the last save was that of `step`."""
        if self.last_saved is None or self.last_saved.name != step_dir_name(step):
            raise UserError(
                f"the run ended at step {step}, but its last checkpoint could not be saved. "
                f"Make room; then the same command resumes from {self.last_saved or 'where this start began'}."
            )

    def _prune(self, position: Position) -> None:
        options = self._recipe.options
        protected = [position.best_step] if options.save_on_best else []
        try:
            prune(self._checkpoints_dir, newest=position.step, keep=options.keep, protected=protected)
        except OSError as error:
            self._warn(f"an old checkpoint could not be deleted: {error}")

    def _export(self, folder: Path, step: int, assembly: Assembly) -> None:
        """Write what makes a checkpoint a model folder, the record of the recipe and the model card. Rank 0."""
        recipe_type = type(self._recipe)
        self._recipe.export(folder, assembly.model)
        record = {
            "recipe": f"{recipe_name(recipe_type)}.{recipe_type.__name__}",
            "options": option_values(self._recipe.options),
            "run": self._identity.to_json(),
        }
        (folder / RECIPE).write_bytes(to_json(record, indent=1))
        if not (folder / CARD).exists():  # the recipe may have one of its own
            facts = CardFacts(
                step=step,
                identity=self._identity,
                num_samples=self._num_samples,
                evaluation=self._newest_evaluation(),
            )
            (folder / CARD).write_text(model_card(self._recipe, folder, facts), encoding="utf-8")

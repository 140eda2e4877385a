"""Checkpoints of a run: when one is saved, which old ones are deleted, and what a failed save means."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.layout import RECIPE, step_dir_name
from shardlaunch.checkpoints.records import Position, to_json
from shardlaunch.checkpoints.writer import save
from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.runs.assembly import Assembly
from shardlaunch.launcher.runs.identity import Identity, option_values
from shardlaunch.launcher.runs.model_card import CARD, CardFacts, model_card
from shardlaunch.launcher.runs.upkeep import Upkeep
from shardlaunch.sharding.environment import report_checkpoint
from shardlaunch.sharding.named_state import group_hyperparameters
from shardlaunch.sharding.world import World

LAST_PAUSES_S = (0.5, 1.0)
"""Before each other try to save the last checkpoint."""


class Saver:
    """Saves the checkpoints of a run and deletes old ones."""

    def __init__(
        self,
        checkpoints_dir: Path,
        upkeep: Upkeep,
        *,
        recipe: Recipe,
        identity: Identity,
        world: World,
        num_samples: Mapping[str, int],
        newest_evaluation: Callable[[], Mapping[str, Any]],
        before_save: Callable[[], None],
        on_saved: Callable[[Position], None],
        warn: Callable[[str], None],
    ) -> None:
        self._checkpoints_dir = checkpoints_dir
        self._upkeep = upkeep
        self._recipe = recipe
        self._identity = identity
        self._world = world
        self._num_samples = num_samples
        self._newest_evaluation = newest_evaluation
        self._before_save = before_save
        self._on_saved = on_saved
        self._warn = warn
        self.last_saved: Path | None = None

    def save(self, position: Position, assembly: Assembly) -> None:
        """Save a checkpoint; a save that fails twice is dropped on all ranks, and the run goes on. All ranks."""
        position.group_hyperparameters = group_hyperparameters(assembly.strategy.optimizer)
        error = self._error_of_save(position, assembly) and self._error_of_save(position, assembly)
        if error:
            self._warn(error)
        self._tidy(position)

    def require_saved(self, position: Position, assembly: Assembly) -> None:
        """Try again to save the last checkpoint if that failed. All ranks. Raises UserError if it still fails."""
        if self._is_saved(position.step):
            return
        for pause_s in LAST_PAUSES_S:
            time.sleep(pause_s)
            if not self._error_of_save(position, assembly):
                self._warn(f"the checkpoint of step {position.step} is saved now")
                self._tidy(position)
                return
        raise UserError(
            f"the run ended at step {position.step}, but its last checkpoint could not be saved. "
            f"Make room; then the same command resumes from {self.last_saved or 'where this start began'}."
        )

    def _tidy(self, position: Position) -> None:
        if self._is_saved(position.step):
            self._on_saved(position)
        if self._world.is_main:
            self._upkeep.prune(position) if self._is_saved(position.step) else self._upkeep.sweep()

    def _is_saved(self, step: int) -> bool:
        return self.last_saved is not None and self.last_saved.name == step_dir_name(step)

    def _error_of_save(self, position: Position, assembly: Assembly) -> str:
        """Save a checkpoint and return "", or why it could not be saved. All ranks."""
        is_new = not os.path.lexists(self._checkpoints_dir / step_dir_name(position.step))
        try:
            try:
                self._world.peers.together(self._before_save)
            except UserError as error:
                raise UserError(f"the checkpoint of step {position.step} was not saved: {error}") from error
            self.last_saved = save(
                self._checkpoints_dir,
                position=position,
                state=assembly.strategy.state(),
                export=lambda folder: self._export(folder, position.step, assembly),
                aliases=assembly.aliases,
                peers=self._world.peers,
            )
        except UserError as error:
            return str(error)
        if is_new and self._world.is_local_main:
            report_checkpoint()
        return ""

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

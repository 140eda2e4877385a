"""Checkpoints of a run: when one is saved, which old ones are deleted, and what a failed save means."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from shardlaunch.checkpoints.files import delete_tree, make_folder
from shardlaunch.checkpoints.layout import RECIPE, step_dir_name
from shardlaunch.checkpoints.names import STAGING_PREFIX
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.records import Position, to_json
from shardlaunch.checkpoints.shares import Share, Snapshots, share_of
from shardlaunch.checkpoints.writer import save
from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.runs.assembly import Assembly
from shardlaunch.launcher.runs.background import Background, Messages
from shardlaunch.launcher.runs.identity import Identity, option_values
from shardlaunch.launcher.runs.model_card import CARD, CardFacts, model_card
from shardlaunch.launcher.runs.replicas import Replicas
from shardlaunch.launcher.runs.upkeep import Upkeep
from shardlaunch.launcher.training.time_left import TimeLeft
from shardlaunch.progress import SAVING, progress
from shardlaunch.sharding.environment import report_checkpoint
from shardlaunch.sharding.named_state import group_hyperparameters
from shardlaunch.sharding.world import World

LAST_PAUSES_S = (0.5, 1.0)
"""Before each other try to save the last checkpoint."""
PART_OF_MEMORY = 0.5
"""What the copies of a machine's ranks may take of the memory that is available there."""
EXPORTED = f"{STAGING_PREFIX}export"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint to save: all that may change while the training goes on is a copy."""

    position: Position
    share: Share
    aliases: Mapping[str, str]
    export: Callable[[Path], None]
    peers: Peers
    on_chunk: Callable[[], None]


class Saver:
    """Saves the checkpoints of a run and deletes old ones, beside the training where there is memory for a copy."""

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
        time_left: TimeLeft,
        replicas: Replicas,
        warn: Messages,
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
        self._time_left = time_left
        self._replicas = replicas
        self._warn = warn
        self._background = Background()
        self._snapshots = Snapshots()
        self._is_beside: bool | None = None
        self._is_saving = False
        self._begun = self._ended = self._stood_s = 0.0
        self.last_saved: Path | None = None

    def save(self, position: Position, assembly: Assembly) -> None:
        """Save a checkpoint, or begin to. All ranks. A save that fails twice is dropped on all ranks.

        The save before ends first. What is saved is the same as if the training waited.
        """
        with phase(SAVING):
            self._begin(position, assembly)

    def _begin(self, position: Position, assembly: Assembly) -> None:
        self.wait()
        assembly.check_trained()
        self._time_left.save_begins()
        self._begun = time.monotonic()
        job = self._job(position, assembly)
        if self._is_beside is None:
            self._is_beside = self._is_beside_training(job.share)
        if not self._is_beside:
            self._save(job)
            self._stood_s = self._ended - self._begun
            self._time_left.save_took(self._stood_s, self._stood_s)
            return
        beside = replace(
            job,
            share=self._snapshots.of(job.share),
            peers=self._world.background_peers,
            on_chunk=self._background.advance,
        )
        self._is_saving = True
        self._background.start(lambda: self._save(beside), name="save")
        self._stood_s = time.monotonic() - self._begun

    def replicate(self, position: Position, assembly: Assembly) -> None:
        """Begin to keep a copy of the state in memory. All ranks. A save before ends first."""
        self.wait()
        job = self._job(position, assembly)
        share = self._snapshots.of(job.share)
        peers = self._world.background_peers

        def work() -> None:
            self._replicas.keep(
                job.position,
                share,
                run=self._identity.digest(),
                aliases=job.aliases,
                export=job.export,
                before=self._before_save,
                peers=peers,
            )

        self._background.start(work, name="replicate")

    def poll(self) -> None:
        """Say what has happened beside the training. Cheap."""
        if self._background.is_done:
            self.wait()
        self._warn.flush()

    def wait(self) -> None:
        """Wait until what was to be saved is saved, or dropped. Raises what was no fault of a disk."""
        if not self._background.is_busy:
            return
        begun = time.monotonic()
        try:
            self._background.wait()
        finally:
            self._warn.flush()
        if not self._is_saving:
            return
        self._is_saving = False
        self._stood_s += time.monotonic() - begun
        self._time_left.save_took(self._ended - self._begun, self._stood_s)

    def close(self) -> None:
        """Wait, at the end of a run that has failed."""
        with suppress(Exception):  # there is an error before it
            self.wait()

    def require_saved(self, position: Position, assembly: Assembly) -> None:
        """Wait for the last checkpoint, and try again if it was dropped. All ranks. Raises UserError if that fails."""
        self.wait()
        if self._is_saved(position.step):
            return
        for pause_s in LAST_PAUSES_S:
            time.sleep(pause_s)
            job = self._job(position, assembly)
            if not self._error_of_save(job):
                self._warn(f"the checkpoint of step {position.step} is saved now")
            self._tidy(job.position)
            if self._is_saved(position.step):
                return
        raise UserError(
            f"the run ended at step {position.step}, but its last checkpoint could not be saved. "
            f"Make room; then the same command resumes from {self.last_saved or 'where this start began'}."
        )

    def _is_beside_training(self, share: Share) -> bool:
        """Return whether the training goes on during a save, as --async-save and the memory have it. All ranks."""
        wanted = self._recipe.options.async_save
        if wanted != "auto":
            return wanted == "on"
        num_bytes = self._world.peers.gather([share.num_bytes])
        here = sum(num_bytes[rank][0] for rank in self._world.local_ranks)
        available = psutil.virtual_memory().available
        if self._world.peers.any(here > PART_OF_MEMORY * available):
            self._warn(
                f"the training stands still during a save: on some machine a copy of what its ranks save (here "
                f"{here / 1e9:.1f} GB) takes more than half of the memory that is available (here "
                f"{available / 1e9:.1f} GB); --async-save on copies nevertheless"
            )
            return False
        return True

    def _job(self, position: Position, assembly: Assembly) -> Job:
        """Return what to save now, with the state itself. All ranks."""
        world, strategy = self._world, assembly.strategy
        position.group_hyperparameters = group_hyperparameters(strategy.optimizer)
        return Job(
            position=deepcopy(position),
            share=share_of(strategy.state(), rank=world.rank, num_ranks=world.size),
            aliases=assembly.aliases,
            export=self._exported(position.step, assembly) if world.is_main else lambda folder: None,
            peers=world.peers,
            on_chunk=progress.advance,
        )

    def _save(self, job: Job) -> None:
        """Save a checkpoint, delete what is superfluous, and warn of what fails."""
        error = self._error_of_save(job) and self._error_of_save(job)
        if error:
            self._warn(error)
        self._tidy(job.position)
        self._ended = time.monotonic()

    def _tidy(self, position: Position) -> None:
        if self._is_saved(position.step):
            self._on_saved(position)
        if self._world.is_main:
            self._upkeep.prune(position) if self._is_saved(position.step) else self._upkeep.sweep()

    def _is_saved(self, step: int) -> bool:
        return self.last_saved is not None and self.last_saved.name == step_dir_name(step)

    def _error_of_save(self, job: Job) -> str:
        """Save a checkpoint and return "", or why it could not be saved. All ranks."""
        step = job.position.step
        is_new = not os.path.lexists(self._checkpoints_dir / step_dir_name(step))
        try:
            try:
                job.peers.together(self._before_save)
            except UserError as error:
                raise UserError(f"the checkpoint of step {step} was not saved: {error}") from error
            self.last_saved = save(
                self._checkpoints_dir,
                position=job.position,
                share=job.share,
                export=job.export,
                aliases=job.aliases,
                peers=job.peers,
                on_chunk=job.on_chunk,
            )
        except UserError as error:
            return str(error)
        if is_new and self._world.is_local_main:
            report_checkpoint()
        return ""

    def _exported(self, step: int, assembly: Assembly) -> Callable[[Path], None]:
        """Let the recipe export now, since the model changes afterwards, and return what completes a folder. Rank 0."""
        recipe_type = type(self._recipe)
        exported = self._checkpoints_dir / EXPORTED
        failure: Exception | None = None
        try:
            delete_tree(exported)
            make_folder(exported)
            self._recipe.export(exported, assembly.model)
            if assembly.adapters is not None:
                assembly.adapters.export(exported, assembly.model)
        except (UserError, OSError) as error:  # it makes the save fail
            failure = error
        record = {
            "recipe": f"{recipe_name(recipe_type)}.{recipe_type.__name__}",
            "options": option_values(self._recipe.options),
            "run": self._identity.to_json(),
        }
        facts = CardFacts(
            step=step,
            identity=self._identity,
            num_samples=self._num_samples,
            evaluation=deepcopy(self._newest_evaluation()),
        )

        def complete(folder: Path) -> None:
            """Write what makes a checkpoint a model folder, the record of the recipe and the model card."""
            if failure is not None:
                raise failure
            shutil.copytree(exported, folder, dirs_exist_ok=True)
            (folder / RECIPE).write_bytes(to_json(record, indent=1))
            if not (folder / CARD).exists():  # the recipe may have one of its own
                (folder / CARD).write_text(model_card(self._recipe, folder, facts), encoding="utf-8")

        return complete

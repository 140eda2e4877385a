"""One launch of a run: load the data, build or restore the state, train, report."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.reader import Checkpoint, open_checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.retention import sweep
from shardlaunch.checkpoints.state import OPTIMIZER
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.reporting.recorder import Recorder
from shardlaunch.launcher.reporting.trackers import tracker_names
from shardlaunch.launcher.runs.assembly import assemble
from shardlaunch.launcher.runs.beginning import show_start
from shardlaunch.launcher.runs.data import load_data
from shardlaunch.launcher.runs.ending import show_result
from shardlaunch.launcher.runs.folder import (
    claim,
    find_checkpoint,
    identity_of_folder,
    new_folder_hint,
    run_folder,
    tracked_run,
    write_run,
)
from shardlaunch.launcher.runs.identity import (
    Identity,
    data_fingerprint,
    option_values,
    run_identity,
    run_record,
    versions,
)
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.result import Result
from shardlaunch.launcher.runs.saver import Saver
from shardlaunch.launcher.training.evaluation import Evaluator
from shardlaunch.launcher.training.loss_check import check_loss
from shardlaunch.launcher.training.stopping import Requests, raise_if_stopped, until_the_end_of_a_step
from shardlaunch.launcher.training.trainer import Hooks, Trainer
from shardlaunch.progress import SAVING
from shardlaunch.sharding.named_state import group_hyperparameters, restore_group_hyperparameters
from shardlaunch.sharding.precision import apply_precision
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, Settings
from shardlaunch.sharding.world import World


class Run:
    """One launch of a run, from loading the data to the final report."""

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        world: World,
        strategy_name: str,
        precision_name: str,
        settings: Settings = DEFAULT_SETTINGS,
        fold: int | None = None,
        display: Display | None = None,
    ) -> None:
        self.recipe = recipe
        self.options = options
        self.world = world
        self.strategy_name = strategy_name
        self.settings = settings
        self.precision = apply_precision(precision_name, world.device)
        self.display = display or Display(silent=not world.is_main)
        self.name = recipe_name(type(recipe))
        self.output_dir = run_folder(options, self.name)
        self.fold = fold
        if fold is not None:
            self.output_dir /= f"fold-{fold + 1}"
        self.trackers = tracker_names(options.tracker)
        self.requests = Requests(self.output_dir if world.is_main else None)

    @property
    def checkpoints_dir(self) -> Path:
        return self.output_dir / CHECKPOINTS

    def run(self) -> Result:
        """Run from the newest checkpoint, or from the beginning, to the end, and return the outcome. All ranks."""
        with ExitStack() as stack:
            self.world.peers.together(
                lambda: stack.enter_context(claim(self.output_dir)) if self.world.is_main else None
            )
            self.prepare()
            stop_at_step = self.options.stop_at_step
            if self.position.is_finished:
                early = ", stopped early" if self.position.has_stopped_early else ""
                self.display.say(f"this run is complete: {self.position.step} of {self._steps_text()} steps{early}")
            elif 0 < stop_at_step <= self.position.step:
                self.display.say(f"already at step {self.position.step} (--stop-at-step {stop_at_step}); nothing to do")
            else:
                with ExitStack() as records:
                    self._train(records)
            return self._end()

    def prepare(self) -> None:
        """Load the data, find the checkpoint to resume from, and build model and trainer. All ranks."""
        with phase("reading data"), collected() as self.notes:
            self.data = load_data(self.recipe, self.world, self.fold)
            self.identity = self._identity()
            self.world.peers.together(lambda: None)  # the other ranks read after rank 0, which shows this phase
        with phase("looking for a checkpoint"):
            self.resumed = self._find_checkpoint()
        self._assemble(self.resumed)
        self._write_run()
        self._show_start()
        self.saver = Saver(
            self.checkpoints_dir,
            recipe=self.recipe,
            identity=self.identity,
            world=self.world,
            num_samples={name: len(split) for name, split in self.data.splits.items()},
            newest_evaluation=lambda: self.recorder.last_evaluation,
            before_save=lambda: self.recorder.sync(),
            warn=self.display.warn,
        )
        self.recorder = Recorder(
            self.display,
            log_every=self.options.log_every,
            track_every=self.options.track_every,
            steps_per_epoch=self.data.plan.steps_per_epoch,
            last_step=self.data.last_step,
        )
        self._build_trainer()

    def _find_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, if any. Raises UserError if it or the output folder has another run."""
        options, world = self.options, self.world
        found = world.peers.together(lambda: identity_of_folder(self.output_dir))
        if found is not None:
            self.identity.check(found, str(self.output_dir), hint=new_folder_hint(options, self.output_dir))
        if world.is_main:
            sweep(self.checkpoints_dir)
        checkpoint = find_checkpoint(options.resume, self.output_dir, peers=world.peers, display=self.display)
        if checkpoint is not None:
            where = str(checkpoint.step_dir)
            saved = checkpoint.recipe.run
            for difference in self.identity.check(saved, where, hint=new_folder_hint(options, self.output_dir)):
                self.display.warn(f"this resume may round differently: {difference}")
        return checkpoint

    def _assemble(self, checkpoint: Checkpoint | None) -> None:
        """Build the model and its strategy, and restore a checkpoint (None: start with the initial weights)."""
        self.assembly = assemble(
            self.recipe,
            world=self.world,
            strategy_name=self.strategy_name,
            settings=self.settings,
            precision_name=self.precision.name,
            run_digest=_digest(self.identity.identity),
            step=checkpoint.step if checkpoint is not None else 0,
            is_resumed=checkpoint is not None,
            init=self.init,
        )
        self.strategy = self.assembly.strategy
        self.position = self._restore(checkpoint)

    def _build_trainer(self) -> None:
        options, world, recipe = self.options, self.world, self.recipe
        evaluator = None
        evaluation_batches = self.data.evaluation_batches(recipe, world)
        if evaluation_batches is not None:
            evaluator = Evaluator(recipe, evaluation_batches, world=world, precision=self.precision)
            assert evaluator.higher_is_better in (True, False)  # checked now, to raise before any training
            if not self.position.is_finished:
                with phase("checking the evaluation on one batch"):
                    self.data.clock(recipe).set(self.position.step, is_evaluation=True)
                    evaluator.rehearse(self.strategy.replicas[0])
        elif options.early_stopping_patience or ("save_on_best" in options.explicitly_set and options.save_on_best):
            raise UserError(
                "--early-stopping-patience and --save-on-best need evaluation data; datasets() returns no 'eval'"
            )
        self.trainer = Trainer(
            recipe,
            options,
            self.strategy,
            self.data.training_batches(recipe, world),
            evaluator,
            world=world,
            precision=self.precision,
            num_steps=self.data.num_steps,
            last_step=self.data.last_step,
            requests=self.requests,
            hooks=Hooks(
                on_step=self.recorder.on_step,
                on_evaluating=self.recorder.on_evaluating,
                on_evaluation=self.recorder.on_evaluation,
                save=self.save,
            ),
        )
        if not self.position.step:
            with phase("checking the loss on one micro-batch"):
                model, batches, warn = self.strategy.replicas[0], self.trainer.batches, self.display.warn
                check_loss(recipe, model, batches, precision=self.precision, device=world.device, warn=warn)

    def _identity(self) -> Identity:
        self.init: InitFrom | None = None
        init_digest = 0
        if self.options.init_from:
            with phase("reading the weights of --init-from"):
                init = self.init = self.world.peers.together(
                    lambda: InitFrom.opened(Path(self.options.init_from), warn=self.display.warn)
                )
                # Rank 0 only: weights may be large, and the built models are compared later.
                digest = self.world.peers.together(lambda: init.weights.digest() if self.world.is_main else "0")
                init_digest = self.world.peers.gather([int(digest, 16) >> 65])[0][0]
        return run_identity(
            self.name,
            self.options,
            num_steps=self.data.num_steps,
            data={name: data_fingerprint(split, seed=self.options.seed) for name, split in self.data.splits.items()},
            plan_digest=self.data.plan.digest(),
            fold=self.fold,
            init_digest=f"{init_digest:016x}" if init_digest else None,
            in_effect={
                "--precision": self.precision.name,
                "--threads-per-rank": torch.get_num_threads(),
                "device": self.world.device.type,
                "torch": versions()["torch"],
            },
        )

    def _restore(self, checkpoint: Checkpoint | None) -> Position:
        if checkpoint is None:
            # Read now, so that an optimizer whose groups cannot be saved is refused before any training.
            return Position(
                group_hyperparameters=group_hyperparameters(self.strategy.optimizer),
                non_persistent_buffers=self.assembly.non_persistent_buffers,
            )
        position = checkpoint.position
        if position.non_persistent_buffers != self.assembly.non_persistent_buffers:
            raise UserError(
                f"{checkpoint.step_dir}: the model's non-persistent buffers differ from the checkpoint's: its "
                f"constructor has changed or draws them at random. Register them with persistent=True"
            )
        with phase("loading the checkpoint"):
            self.strategy.restore(checkpoint)
        if position.step and not any(spec.section == OPTIMIZER for spec in checkpoint.specs()):
            kind = type(self.strategy.optimizer)
            if kind is not torch.optim.SGD or any(group["momentum"] for group in self.strategy.optimizer.param_groups):
                self.display.warn(
                    f"{checkpoint.step_dir}: holds no optimizer state, so that {kind.__name__} starts anew; this is "
                    f"right only if it keeps none"
                )
        if position.step != self.options.unfreeze_at_step:  # there, the parameter groups change
            restore_group_hyperparameters(self.strategy.optimizer, position.group_hyperparameters)
        # A run also ends by early stopping. A run that is extended is no longer finished at its original end, and an
        # extended run may be further than the last step of this command.
        ended_early = position.is_finished and position.step < self.data.num_steps
        position.is_finished = position.has_stopped_early or ended_early or position.step >= self.data.last_step
        return position

    def _write_run(self) -> None:
        record = run_record(self.identity, self.options, self.world.size, self.strategy_name)
        if max(self.data.last_step, self.position.step) > self.data.num_steps:
            record["extended_to_steps"] = max(self.data.last_step, self.position.step)
        self.world.peers.together(lambda: self._write_record(record) if self.world.is_main else None)

    def _write_record(self, record: dict[str, Any]) -> None:
        folder = self.output_dir
        name = folder.name if self.fold is None else f"{folder.parent.name}/{folder.name}"
        self.tracked = tracked_run(folder, self.identity, project=self.options.project or self.name, name=name)
        record["tracking_id"] = self.tracked.tracking_id
        write_run(folder, record, least_bytes=4 * self.assembly.num_elements)

    def _train(self, stack: ExitStack) -> None:
        end = min(self.data.last_step, self.options.stop_at_step or self.data.last_step)
        self.world.peers.together(lambda: self._open_records(stack, end) if self.world.is_main else None)
        unfreeze_at = self.options.unfreeze_at_step
        if self.position.step < unfreeze_at < end:
            self._train_to(unfreeze_at)
            if self.position.is_finished:
                return
            self._unfreeze()
        self._train_to(end)

    def _open_records(self, stack: ExitStack, end: int) -> None:
        self.recorder.open(
            stack,
            self.tracked,
            trackers=self.trackers,
            step=self.position.step,
            end=end,
            options=option_values(self.options),
        )

    def _train_to(self, end: int) -> None:
        with until_the_end_of_a_step():
            cause = self.trainer.run(self.position, end=end)
        self.saver.require_saved(self.position.step)
        raise_if_stopped(cause, self.position.step)

    def _unfreeze(self) -> None:
        """Continue with all parameters trainable, exactly as a resume from this step's checkpoint would."""
        assert self.saver.last_saved is not None
        checkpoint = open_checkpoint(self.saver.last_saved, peers=self.world.peers)
        del self.trainer, self.strategy, self.assembly  # free memory for the next
        self._assemble(checkpoint)
        self.display.say(f"step {self.position.step}: unfroze all parameters")
        self.display.parameters(self.assembly.rows)
        self._build_trainer()

    def save(self, position: Position) -> None:
        """Save a checkpoint of the current state; a save that fails only causes a warning. All ranks."""
        with phase(SAVING):
            self.saver.save(position, self.assembly)

    def _steps_text(self) -> str:
        extended_to = max(self.data.last_step, self.position.step)
        return f"{self.data.num_steps}" + (f", extended to {extended_to}" if extended_to > self.data.num_steps else "")

    def _show_start(self) -> None:
        for text in self.notes.warnings:  # about the data
            self.display.warn(text)
        show_start(
            self.display,
            self.recipe,
            self.data,
            self.assembly,
            name=self.name,
            world=self.world,
            strategy_name=self.strategy_name,
            precision_name=self.precision.name,
            steps=self._steps_text(),
            fold=self.fold,
            notes=self.notes,
            checkpoint=self.resumed,
            init=self.init,
            output_dir=self.output_dir,
        )

    def _end(self) -> Result:
        """Print the last lines and return the outcome. All ranks."""
        last = self.saver.last_saved or (self.resumed.step_dir if self.resumed is not None else None)
        # Rank 0 first: then it has deleted old checkpoints, and all ranks find the same ones.
        result = self.world.main_first(lambda: Result.of_folder(self.output_dir, last=last))
        result = replace(result, is_finished=self.position.is_finished)
        if self.world.is_main:
            show_result(self.display, result, self.recipe, best_step=self.position.best_step)
        return result


def _digest(record: Mapping[str, Any]) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(record).encode()) >> 1

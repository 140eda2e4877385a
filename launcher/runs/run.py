"""One launch of a run: load the data, build or restore the state, train, report."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.manifest import DamagedCheckpoint
from shardlaunch.checkpoints.reader import Checkpoint, checkpoint_steps, open_checkpoint
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.reporting.recorder import Recorder, StepReport
from shardlaunch.launcher.reporting.trackers import tracker_names
from shardlaunch.launcher.runs.assembly import assemble
from shardlaunch.launcher.runs.background import Messages
from shardlaunch.launcher.runs.beginning import show_start
from shardlaunch.launcher.runs.callbacks import Callbacks
from shardlaunch.launcher.runs.data import load_data
from shardlaunch.launcher.runs.ending import result_of, show_result
from shardlaunch.launcher.runs.folder import claim, find_checkpoint, new_folder_hint, run_folder, tracked_run, write_run
from shardlaunch.launcher.runs.identifying import identify
from shardlaunch.launcher.runs.identity import option_values, run_record
from shardlaunch.launcher.runs.observing import observe
from shardlaunch.launcher.runs.preflight import Room, check_shared
from shardlaunch.launcher.runs.replicas import Replicas
from shardlaunch.launcher.runs.restoring import restore
from shardlaunch.launcher.runs.result import Result
from shardlaunch.launcher.runs.resuming import identity_in_folder, identity_of_resume
from shardlaunch.launcher.runs.rollback import delete_superseded, left_out_of, with_rollback
from shardlaunch.launcher.runs.saver import Saver
from shardlaunch.launcher.runs.second_place import SecondPlace
from shardlaunch.launcher.runs.upkeep import Upkeep
from shardlaunch.launcher.training.attention import faster_attention
from shardlaunch.launcher.training.bad_numbers import RollBack
from shardlaunch.launcher.training.evaluation import Evaluator
from shardlaunch.launcher.training.loss_check import check_loss
from shardlaunch.launcher.training.stopping import (
    Requests,
    nothing_left_to_stop,
    raise_if_stopped,
    until_the_end_of_a_step,
)
from shardlaunch.launcher.training.time_left import TimeLeft
from shardlaunch.launcher.training.trainer import Hooks, Trainer
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
        self.warn = Messages(self.display.warn)
        self.name = recipe_name(type(recipe))
        self.output_dir = run_folder(options, self.name)
        self.callbacks = Callbacks(self, [])
        self.fold = fold
        if fold is not None:
            self.output_dir /= f"fold-{fold + 1}"
        self.trackers = tracker_names(options.tracker)
        folders = {self.output_dir, run_folder(options, self.name)} if world.is_main else set()
        time_left = TimeLeft.of(options, say=self.display.say, warn=self.display.warn)
        self.requests = Requests(sorted(folders), time_left)
        self.room = Room(self.output_dir, options, world, warn=self.display.warn)
        self.upkeep = Upkeep(self.checkpoints_dir, options, warn=self.warn)
        self.second = SecondPlace(options, self.output_dir, world, self.display, fold=fold)
        self.upkeep.busy = self.second.busy
        self.replicas = Replicas(options, self.output_dir, world, say=self.display.say, warn=self.warn)

    @property
    def checkpoints_dir(self) -> Path:
        return self.output_dir / CHECKPOINTS

    def run(self) -> Result:
        """Run from the newest checkpoint, or from the beginning, to the end, and return the outcome. All ranks."""
        with ExitStack() as stack:
            self.world.peers.together(
                lambda: (
                    stack.enter_context(claim(self.output_dir, warn=self.display.warn)) if self.world.is_main else None
                )
            )
            check_shared(self.output_dir, self.world, warn=self.display.warn)
            stack.callback(self.second.close)
            self.prepare()
            stop_at_step = self.options.stop_at_step
            if self.position.is_finished:
                early = ", stopped early" if self.position.has_stopped_early else ""
                steps = self.data.steps_text(self.position.step)
                self.display.say(f"this run is complete: {self.position.step} of {steps} steps{early}")
            elif 0 < stop_at_step <= self.position.step:
                self.display.say(f"already at step {self.position.step} (--stop-at-step {stop_at_step}); nothing to do")
            else:
                while back := self._train():
                    self._roll_back(back)
            self.second.finish()
            return self.callbacks.end(self._end())

    def prepare(self) -> None:
        """Load the data, find the checkpoint to resume from, and build model and trainer. All ranks."""
        with phase("reading data"), collected() as self.notes:
            self.data = load_data(self.recipe, self.world, self.fold)
            self.options.first_averaged(self.data.num_steps)  # raises
            self.init, self.identity = identify(
                self.name,
                self.recipe,
                self.data,
                world=self.world,
                precision_name=self.precision.name,
                fold=self.fold,
                warn=self.display.warn,
            )
            self.world.peers.together(lambda: None)  # the other ranks read after rank 0, which shows this phase
        self._resume()
        if self.world.is_main:
            self.upkeep.prune_resumed(self.resumed, self.position)
        self.room.check_start(self.resumed, self.assembly.num_saved, self.position, last_step=self.data.last_step)
        self._write_run()
        self._show_start()
        self.saver = Saver(
            self.checkpoints_dir,
            self.upkeep,
            recipe=self.recipe,
            identity=self.identity,
            world=self.world,
            num_samples={name: len(split) for name, split in self.data.splits.items()},
            newest_evaluation=lambda: self.recorder.last_evaluation,
            before_save=lambda: self.recorder.sync(),
            on_saved=self.callbacks.noting(self.second.copy),
            time_left=self.requests.time_left,
            replicas=self.replicas,
            warn=self.warn,
        )
        self.recorder = Recorder(
            self.display,
            log_every=self.options.log_every,
            track_every=self.options.track_every,
            steps_per_epoch=self.data.plan.steps_per_epoch,
            last_step=self.data.last_step,
        )
        self._build_trainer()

    def _resume(self) -> None:
        """Find the checkpoint to resume from, and build the model with its values. All ranks."""
        for checks_tensors in (False, True):  # where reading has found damage, look at every byte before
            with phase("looking for a checkpoint"):
                self.resumed = self._find_checkpoint(checks_tensors=checks_tensors)
            try:
                self._assemble(self.resumed)
                return
            except DamagedCheckpoint:
                if checks_tensors:
                    raise
                del self.strategy, self.assembly  # free memory for the next

    def _find_checkpoint(self, *, checks_tensors: bool) -> Checkpoint | None:
        """Return the checkpoint to resume from, if any. Raises UserError if it or the output folder has another run."""
        options, world = self.options, self.world
        hint = new_folder_hint(options, self.output_dir)
        self.identity = identity_in_folder(self.identity, self.output_dir, peers=world.peers, hint=hint)
        self.left_out = world.peers.together(lambda: left_out_of(self.output_dir, self.identity))
        if world.is_main:
            self.upkeep.sweep()
        if options.resume == "auto":
            self.replicas.bring_back(self.identity)
        checkpoint = self.second.find(
            lambda: self._find_here(options.resume, checks_tensors=checks_tensors), self.identity, hint=hint
        )
        if checkpoint is not None:
            self.identity = identity_of_resume(self.identity, checkpoint, hint=hint, warn=self.display.warn)
        if self.identity.has_former_order and not self.data.is_in_former_order:
            self.data = self.data.in_former_order()
            self.display.say("this run began in the order of batches of an earlier version, and keeps it")
        return checkpoint

    def _find_here(self, resume: str, *, checks_tensors: bool = True) -> Checkpoint | None:
        peers = self.world.peers
        peers.together(lambda: delete_superseded(self.output_dir, self.left_out) if self.world.is_main else None)
        return find_checkpoint(
            resume, self.output_dir, peers=peers, display=self.display, checks_tensors=checks_tensors
        )

    def _assemble(self, checkpoint: Checkpoint | None) -> None:
        """Build the model and its strategy, and restore a checkpoint (None: start with the initial weights)."""
        self.assembly = assemble(
            self.recipe,
            world=self.world,
            strategy_name=self.strategy_name,
            settings=self.settings,
            precision_name=self.precision.name,
            run_digest=self.identity.digest(),
            step=checkpoint.step if checkpoint is not None else 0,
            is_resumed=checkpoint is not None,
            init=self.init,
        )
        self.strategy = self.assembly.strategy
        self.position = restore(
            checkpoint, self.assembly, self.options, self.data, peers=self.world.peers, warn=self.display.warn
        )
        known = self.position.left_out
        self.left_out = self.position.left_out = [*known, *(each for each in self.left_out if each not in known)]

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
                on_step=self._on_step,
                on_left_out=self.recorder.on_left_out,
                on_evaluating=self.recorder.on_evaluating,
                on_evaluation=self.recorder.on_evaluation,
                save=lambda position: self.saver.save(position, self.assembly),
                replicate=lambda position: self.saver.replicate(position, self.assembly),
                on_first_state=lambda num_bytes: self.room.check(
                    num_bytes, steps_left=self.data.last_step - self.position.step, is_exact=True
                ),
            ),
        )
        self.callbacks.join()
        observe(self.trainer, self.output_dir, first=self.position.step, display=self.display)
        if not self.position.step:
            with phase("checking the loss on one micro-batch"):
                model, batches, warn = self.strategy.replicas[0], self.trainer.batches, self.display.warn
                check_loss(recipe, model, batches, precision=self.precision, device=world.device, warn=warn)

    def _write_run(self) -> None:
        record = run_record(
            self.identity,
            self.recipe,
            self.world.size,
            self.strategy_name,
            extended_to=self.data.extended_to(self.position.step),
            left_out=self.left_out,
        )
        self.world.peers.together(lambda: self._write_record(record) if self.world.is_main else None)

    def _write_record(self, record: dict[str, Any]) -> None:
        folder = self.output_dir
        name = folder.name if self.fold is None else f"{folder.parent.name}/{folder.name}"
        self.tracked = tracked_run(folder, self.identity, project=self.options.project or self.name, name=name)
        record["tracking_id"] = self.tracked.tracking_id
        write_run(folder, record)

    def _train(self) -> RollBack | None:
        """Train to the end, or until a loss asks for a rollback, which is returned. All ranks."""
        end = min(self.data.last_step, self.options.stop_at_step or self.data.last_step)
        with ExitStack() as records:
            self.world.peers.together(lambda: self._open_records(records, end) if self.world.is_main else None)
            records.callback(self.saver.close)  # first: it needs the records
            self.callbacks.start()
            self.requests.time_left.assume_save_of(self.assembly.bytes_to_save(self.options) // self.world.size)
            unfreeze_at = self.options.unfreeze_at_step
            try:
                if self.position.step < unfreeze_at < end:
                    self._train_to(unfreeze_at)
                    if self.position.is_finished:
                        return None
                    self._unfreeze()
                self._train_to(end, is_last=self.fold is None or self.fold == self.options.folds - 1)
            except RollBack as back:
                return RollBack(back.step, back.cause)  # without the frames of this one, which hold the loader
        return None

    def _roll_back(self, back: RollBack) -> None:
        """Go back to the newest checkpoint before the batches that are left out from now on. All ranks.

        Those are recorded first, so that a start after a crash leaves them out too.
        """
        first = max(1, back.step - self.options.leave_out + 1)
        steps = [step for step in checkpoint_steps(self.checkpoints_dir) if step < first]
        known = with_rollback(self.left_out, back, count=self.options.leave_out, newest=steps[-1] if steps else 0)
        self.world.peers.together(lambda: None)  # all have looked
        self.left_out = known
        self._write_run()
        resume = self.options.resume if not steps and self.options.resume != "never" else "auto"
        checkpoint = self._find_here(resume)
        start = checkpoint.step if checkpoint is not None else 0
        self.display.warn(
            f"{back}: going back to step {start}, and from there on without the global "
            f"{f'batches of steps {first} to {back.step}' if first < back.step else f'batch of step {back.step}'}"
        )
        self._rebuild(checkpoint)

    def _rebuild(self, checkpoint: Checkpoint | None) -> None:
        del self.trainer, self.strategy, self.assembly  # free memory for the next
        self._assemble(checkpoint)
        self._build_trainer()

    def _open_records(self, stack: ExitStack, end: int) -> None:
        self.recorder.open(
            stack,
            self.tracked,
            trackers=self.trackers,
            step=self.position.step,
            is_evaluation_due=self.position.is_evaluation_due,
            end=end,
            options=option_values(self.options),
        )

    def _train_to(self, end: int, *, is_last: bool = False) -> None:
        start = self.position.step
        with until_the_end_of_a_step():
            with faster_attention(self.options, self.world.device):
                cause = self.trainer.run(self.position, end=end)
            if is_last and not cause:
                nothing_left_to_stop(0)
        self.saver.wait()
        if self.position.step > start:
            self.saver.require_saved(self.position, self.assembly)
            self.replicas.forget()
        self.second.finish()
        if self.world.is_main:
            self.upkeep.prune(self.position)  # what was being copied before
        self.callbacks.finish()
        raise_if_stopped(cause, self.position.step)

    def _unfreeze(self) -> None:
        """Continue with all parameters trainable, exactly as a resume from this step's checkpoint would."""
        assert self.saver.last_saved is not None
        self._rebuild(open_checkpoint(self.saver.last_saved, peers=self.world.peers))
        self.display.say(f"step {self.position.step}: unfroze all parameters")
        self.display.parameters(self.assembly.rows)

    def _on_step(self, step: int, report: StepReport) -> None:
        self.recorder.on_step(step, report)
        self.saver.poll()

    def _show_start(self) -> None:
        show_start(
            self.display,
            self.recipe,
            self.data,
            self.assembly,
            name=self.name,
            world=self.world,
            strategy_name=self.strategy_name,
            precision_name=self.precision.name,
            steps=self.data.steps_text(self.position.step),
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
        result = self.world.main_first(
            lambda: result_of(self.output_dir, self.position, last=last, warn=self.display.warn)
        )
        result = replace(result, is_finished=self.position.is_finished)
        if self.world.is_main:
            show_result(self.display, result, self.recipe, best_step=self.position.best_step)
        return result

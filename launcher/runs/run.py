"""One launch of a run: from options and connected ranks to data, model, strategy, trainer, and its last line."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from shardlaunch.checkpoints.layout import CHECKPOINTS, RECIPE, step_dir_name
from shardlaunch.checkpoints.reader import Checkpoint, open_checkpoint
from shardlaunch.checkpoints.retention import prune, sweep
from shardlaunch.checkpoints.writer import save
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.reporting.display import Display, ProgressView
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX, MetricsLog, Trackers, read_metrics, tracker_names
from shardlaunch.launcher.runs.assembly import assemble
from shardlaunch.launcher.runs.folder import (
    claim,
    find_checkpoint,
    identity_of_folder,
    saved_identity,
    write_run,
)
from shardlaunch.launcher.runs.folds import checked_splits
from shardlaunch.launcher.runs.identity import (
    Identity,
    data_fingerprint,
    option_values,
    run_identity,
    run_record,
    versions,
)
from shardlaunch.launcher.training.batches import Batches, BatchPlan, EvaluationPlan
from shardlaunch.launcher.training.evaluation import Evaluation, Evaluator, numbers
from shardlaunch.launcher.training.trainer import Hooks, Position, StepReport, Trainer
from shardlaunch.sharding.named_state import group_hyperparameters, restore_group_hyperparameters
from shardlaunch.sharding.precision import apply_precision
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, Settings
from shardlaunch.sharding.world import World


class Run:
    """One launch of a run, from its data to its last line."""

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        world: World,
        strategy_name: str,
        precision_name: str,
        settings: Settings = DEFAULT_SETTINGS,
        fold: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.options = options
        self.world = world
        self.strategy_name = strategy_name
        self.settings = settings
        self.precision = apply_precision(precision_name, world.device)
        self.display = Display(silent=not world.is_main)
        self.name = recipe_name(type(recipe))
        preset = f"-{options.preset}" if options.preset else ""
        self.output_dir = Path(options.output_dir or f"outputs/{self.name}{preset}")
        self.fold = fold
        if fold is not None:
            self.output_dir /= f"fold-{fold + 1}"
        self.trackers = tracker_names(options.tracker)
        self.progress: ProgressView | None = None
        self.last_saved: Path | None = None

    @property
    def checkpoints_dir(self) -> Path:
        return self.output_dir / CHECKPOINTS

    def run(self) -> None:
        """Do all of it. All ranks."""
        with ExitStack() as stack:
            self.world.peers.together(
                lambda: stack.enter_context(claim(self.output_dir)) if self.world.is_main else None
            )
            self._prepare()
            if self.position.is_finished:
                self.display.say(f"this run is complete: {self.position.step} of {self.num_steps} steps")
            elif 0 < self.options.stop_at_step <= self.position.step:
                self.display.say(f"this run is at step {self.position.step}, past --stop-at-step")
            else:
                self._train(stack)
            self._say_end()

    def _prepare(self) -> None:
        """Load the data and decide where to begin."""
        options, world, recipe = self.options, self.world, self.recipe
        self.splits = world.main_first(lambda: checked_splits(recipe, self.fold))
        self.plan = BatchPlan(
            num_samples=len(self.splits["train"]),
            global_batch_size=options.global_batch_size,
            micro_batch_size=options.micro_batch_size,
            seed=options.seed,
            lengths=recipe.lengths(self.splits["train"]),
        )
        self.num_steps = options.max_steps or options.epochs * self.plan.steps_per_epoch
        if options.unfreeze_at_step >= self.num_steps:
            raise UserError(f"--unfreeze-at-step {options.unfreeze_at_step}: the run has {self.num_steps} steps only")
        if options.warmup_steps >= self.num_steps:
            raise UserError(f"--warmup-steps {options.warmup_steps}: the run has {self.num_steps} steps only")
        self.identity = self._identity()
        found = identity_of_folder(self.output_dir)
        if found is not None:
            self.identity.check(found, str(self.output_dir))
        if world.is_main:
            sweep(self.checkpoints_dir)
        checkpoint = find_checkpoint(options.resume, self.output_dir, peers=world.peers, display=self.display)
        if checkpoint is not None:
            for difference in self.identity.check(saved_identity(checkpoint), str(checkpoint.step_dir)):
                self.display.warn(f"this resume may round differently: {difference}")
        self._assemble(checkpoint)
        self._write_run()
        self._say_start(checkpoint)
        self._build_trainer()

    def _assemble(self, checkpoint: Checkpoint | None) -> None:
        """Build and spread the model as it is at the step of a checkpoint (None: at the start), with its values."""
        self.assembly = assemble(
            self.recipe,
            world=self.world,
            strategy_name=self.strategy_name,
            settings=self.settings,
            precision_name=self.precision.name,
            run_digest=_digest(self.identity.identity),
            step=checkpoint.step if checkpoint is not None else 0,
            is_resumed=checkpoint is not None,
        )
        self.strategy = self.assembly.strategy
        self.position = self._restore(checkpoint)

    def _build_trainer(self) -> None:
        options, world, recipe, splits = self.options, self.world, self.recipe, self.splits
        evaluator = None
        if "eval" in splits:
            plan = EvaluationPlan(
                num_samples=len(splits["eval"]),
                global_batch_size=options.global_batch_size,
                micro_batch_size=options.micro_batch_size,
                seed=options.seed,
                lengths=recipe.lengths(splits["eval"]),
            )
            batches = self._batches(splits["eval"], plan, training=False)
            evaluator = Evaluator(recipe, batches, world=world, precision=self.precision)
            assert evaluator.higher_is_better in (True, False)  # asked now, to raise before any training
            if not self.position.is_finished:
                evaluator.rehearse(self.strategy.replicas[0])
        elif options.early_stopping_patience or options.save_on_best:
            raise UserError(
                "--early-stopping-patience and --save-on-best need evaluation data, which the recipe has not"
            )
        self.trainer = Trainer(
            recipe,
            options,
            self.strategy,
            self._batches(splits["train"], self.plan, training=True),
            evaluator,
            world=world,
            precision=self.precision,
            num_steps=self.num_steps,
            hooks=Hooks(
                on_step=self._on_step,
                on_evaluating=self._on_evaluating,
                on_evaluation=self._on_evaluation,
                save=self._save,
            ),
        )

    def _batches(self, dataset: Any, plan: BatchPlan, *, training: bool) -> Batches:
        return Batches(
            dataset,
            plan,
            collate=self.recipe.collate,
            num_targets=self.recipe.num_targets,
            num_tokens=self.recipe.num_tokens,
            rank=self.world.rank,
            num_ranks=self.world.size,
            training=training,
            num_workers=self.options.num_workers,
        )

    def _identity(self) -> Identity:
        return run_identity(
            self.name,
            self.options,
            num_steps=self.num_steps,
            data={name: data_fingerprint(split) for name, split in self.splits.items()},
            plan_digest=self.plan.digest(),
            fold=self.fold,
            in_force={
                "--precision": self.precision.name,
                "--threads-per-rank": torch.get_num_threads(),
                "device": self.world.device.type,
                "torch": versions()["torch"],
            },
        )

    def _restore(self, checkpoint: Checkpoint | None) -> Position:
        if checkpoint is None:
            # Asked now, so that an optimizer whose groups cannot be saved is refused before any work.
            return Position(
                group_hyperparameters=group_hyperparameters(self.strategy.optimizer),
                non_persistent_buffers=self.assembly.non_persistent_buffers,
            )
        position = Position.from_json(checkpoint.trainer_state)
        if position.non_persistent_buffers != self.assembly.non_persistent_buffers:
            raise UserError(
                f"{checkpoint.step_dir}: the model's buffers outside of its state are not those of the run: the "
                f"constructor draws them at random, or has changed. Register them with persistent=True"
            )
        self.strategy.restore(checkpoint)
        if position.step != self.options.unfreeze_at_step:  # there, the groups of parameters are others
            restore_group_hyperparameters(self.strategy.optimizer, position.group_hyperparameters)
        return position

    def _write_run(self) -> None:
        record = run_record(self.identity, self.options, self.world.size, self.strategy_name)
        least_bytes = 4 * self.assembly.num_elements
        self.world.peers.together(
            lambda: write_run(self.output_dir, record, least_bytes=least_bytes) if self.world.is_main else None
        )

    def _train(self, stack: ExitStack) -> None:
        self.log: MetricsLog | None = None
        self.world.peers.together(lambda: self._open_logs(stack) if self.world.is_main else None)
        end = min(self.num_steps, self.options.stop_at_step or self.num_steps)
        self.progress = stack.enter_context(self.display.progress(done=self.position.step, total=end))
        unfreeze_at = self.options.unfreeze_at_step
        if self.position.step < unfreeze_at < end:
            self._train_to(unfreeze_at)
            if self.position.is_finished:
                return
            self._unfreeze()
        self._train_to(end)

    def _train_to(self, end: int) -> None:
        self.trainer.run(self.position, end=end)
        if self.last_saved is None or self.last_saved.name != step_dir_name(self.position.step):
            raise UserError(
                f"the run ended at step {self.position.step}, but its last checkpoint could not be saved. "
                f"Make room; then the same command resumes from {self.last_saved or 'where this start began'}."
            )

    def _unfreeze(self) -> None:
        """Go on with all parameters trained, as a resume from the checkpoint of this step would."""
        assert self.last_saved is not None
        checkpoint = open_checkpoint(self.last_saved, peers=self.world.peers)
        del self.trainer, self.strategy, self.assembly  # room for the next
        self._assemble(checkpoint)
        self.display.say(f"step {self.position.step}: --freeze has ended")
        self.display.parameters(self.assembly.rows)
        self._build_trainer()

    def _open_logs(self, stack: ExitStack) -> None:
        """Open metrics.jsonl and the trackers. Rank 0."""
        step = self.position.step
        self.log = MetricsLog(self.output_dir, resumed_step=step)
        stack.callback(self.log.close)
        self.tracker = Trackers(
            self.trackers,
            self.output_dir,
            resumed_step=step,
            options=option_values(self.options),
            warn=self.display.warn,
        )
        stack.callback(self.tracker.close)

    def _on_step(self, step: int, report: StepReport) -> None:
        if self.log is None:
            return
        assert self.progress is not None
        self.progress.step(
            step,
            loss=report.loss,
            lr=report.lr,
            tokens=report.tokens,
            samples=report.samples,
            step_s=report.step_s,
        )
        values = {"loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm}
        if step % self.options.log_every == 0 or step == self.num_steps:
            counts = {"samples": report.samples, "tokens": report.tokens, "step_s": report.step_s}
            skipped = {"skipped": True} if report.is_skipped else {}
            self.log.write({**self._where(step), **values, **counts, **skipped})
        if step % self.options.track_every == 0 or step == self.num_steps:
            self.tracker.log(values, step)

    def _on_evaluating(self, num_done: int, num_samples: int) -> None:
        assert self.progress is not None
        self.progress.evaluating(num_done, num_samples)

    def _on_evaluation(self, step: int, results: Evaluation) -> None:
        if self.log is not None:
            values = {f"{EVAL_PREFIX}{name}": value for name, value in results.items()}
            self.log.write({**self._where(step), **values})
            self.tracker.log(numbers(values), step)
        shown = (f"{name} {value:.4f}" for name, value in numbers(results).items())
        self.display.say(f"step {step}: " + "  ".join(shown))

    def _where(self, step: int) -> dict[str, float]:
        return {"step": step, "epoch": step / self.plan.steps_per_epoch}

    def _save(self, position: Position) -> None:
        """Save a checkpoint; a save that fails is dropped on all ranks, the run goes on. All ranks."""
        position.group_hyperparameters = group_hyperparameters(self.strategy.optimizer)
        try:
            self.world.peers.together(lambda: self.log.sync() if self.log is not None else None)
            self.last_saved = save(
                self.checkpoints_dir,
                step=position.step,
                state=self.strategy.state(),
                trainer_state=asdict(position),
                export=self._export,
                aliases=self.assembly.aliases,
                peers=self.world.peers,
            )
        except UserError as error:
            self.display.warn(str(error))
            return
        if self.world.is_main:
            protected = [position.best_step] if self.options.save_on_best else []
            try:
                prune(self.checkpoints_dir, newest=position.step, keep=self.options.keep, protected=protected)
            except OSError as error:
                self.display.warn(f"an old checkpoint could not be deleted: {error}")

    def _export(self, folder: Path) -> None:
        self.recipe.export(folder, self.assembly.model)
        record = {
            "recipe": f"{self.name}.{type(self.recipe).__name__}",
            "options": option_values(self.options),
            "run": self.identity.to_json(),
        }
        (folder / RECIPE).write_text(json.dumps(record, indent=1))

    def _say_start(self, checkpoint: Checkpoint | None) -> None:
        options, world = self.options, self.world
        replicas = world.size * len(self.strategy.replicas)
        assembly = self.assembly
        num_new = "" if checkpoint else f", {len(assembly.fresh)} of {assembly.num_tensors} tensors fresh"
        begin = f"step {checkpoint.step} ({checkpoint.step_dir})" if checkpoint else "the beginning"
        self.display.summary(
            {
                "recipe": f"{self.name} ({type(self.recipe).__name__}), {type(assembly.model).__name__}",
                "parameters": f"{assembly.num_elements:,}{num_new}",
                "ranks": f"{world.size} x {_device_name(world)}, threads each: {torch.get_num_threads()}",
                "strategy": ": ".join(filter(None, (self.strategy_name, self.strategy.describe()))),
                "precision": self.precision.name,
                "global batch": f"{options.global_batch_size} = micro-batch {options.micro_batch_size} x "
                f"accumulation {-(-options.micro_batches // replicas)} x {replicas} "
                f"{'rank' if replicas == 1 else 'ranks' if world.size > 1 else 'replicas'}"
                + (", the last round not full" if options.micro_batches % replicas else ""),
                "steps": f"{self.num_steps} ({self.plan.steps_per_epoch} an epoch, {self.plan.num_samples:,} samples)",
                **({"fold": f"{self.fold + 1} of {options.folds}"} if self.fold is not None else {}),
                "begins at": begin,
                "output": str(self.output_dir),
            }
        )
        if checkpoint is None and 0 < len(assembly.fresh) < assembly.num_tensors:
            self.display.say(f"fresh weights: {', '.join(assembly.fresh)}")
        if any(row.lr is None for row in assembly.rows) or options.lr_factors:
            self.display.parameters(self.assembly.rows)

    def last_evaluation(self) -> Evaluation:
        """Return what the last evaluation gave, empty when there was none. All ranks; they read it from the log."""
        evaluations = [line for line in read_metrics(self.output_dir) if f"{EVAL_PREFIX}loss" in line]
        return evaluations[-1] if evaluations else {}

    def _say_end(self) -> None:
        last = self.last_evaluation()
        if last:
            results = {key: value for key, value in last.items() if key.startswith(EVAL_PREFIX)}
            self.display.table(f"evaluation at step {last['step']}", numbers(results))
            for name, value in results.items():
                if isinstance(value, list):
                    self.display.matrix(name, value)
            for name, metric in self.recipe.metrics().items():
                if hasattr(metric, "signature"):
                    self.display.say(f"{name:<6} {metric.signature}")
        checkpoint = self.checkpoints_dir / step_dir_name(self.position.step)
        if self.position.best_value is not None:
            best = f"{self.recipe.best_metric} {self.position.best_value:.4f} at step {self.position.best_step}"
            self.display.say(f"best   {best}")
        self.display.say(f"model  {checkpoint}")
        if self.recipe.usage(checkpoint):
            self.display.say(f"use    {self.recipe.usage(checkpoint)}")


def _digest(record: Mapping[str, Any]) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(record).encode()) >> 1


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"

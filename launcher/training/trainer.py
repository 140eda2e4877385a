"""The training loop: steps and micro-batches. Ranks and strategies are hidden behind `World` and `Strategy`."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.state_digests import digests_of_state
from shardlaunch.errors import UserError
from shardlaunch.launcher.optimization.freezing import train_mode
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.recorder import StepReport
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX
from shardlaunch.launcher.training.averaging import Averaging, best_metric_in
from shardlaunch.launcher.training.batches import Batches, GlobalBatch
from shardlaunch.launcher.training.clock import Clock
from shardlaunch.launcher.training.evaluation import Evaluation, Evaluator
from shardlaunch.launcher.training.log_sums import LogSums
from shardlaunch.launcher.training.references import ReferencesStay
from shardlaunch.launcher.training.slow_ranks import PartTimes, slowest, spread
from shardlaunch.launcher.training.step_sums import CountedBatch, StepSums
from shardlaunch.launcher.training.stopping import Asked, BrokenOff, Polls, Requests
from shardlaunch.launcher.training.updates import Updater, Updates
from shardlaunch.progress import BETWEEN_STEPS, DATA, progress
from shardlaunch.sharding.precision import Precision
from shardlaunch.sharding.strategy import Strategy
from shardlaunch.sharding.world import World


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions that the trainer calls during a run, on all ranks."""

    on_step: Callable[[int, StepReport], None]
    on_left_out: Callable[[int], None]
    on_evaluating: Callable[[int, int], None]
    on_evaluation: Callable[[int, Evaluation], None]
    save: Callable[[Position], None]
    replicate: Callable[[Position], None] = lambda position: None
    """Keep a copy of the state in memory."""
    on_first_state: Callable[[int], None] = lambda num_bytes: None
    """Told how many bytes the state has, all of it, after the first step."""
    states: Callable[[], dict[str, dict[str, Any]]] = dict
    """Return the states of callbacks, for a checkpoint."""


class Trainer:
    """The training loop of a recipe, from a position to the end.

    The learning rate follows a schedule over `num_steps`; a run that is extended ends at the later step `last_step`.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        strategy: Strategy,
        batches: Batches,
        evaluator: Evaluator | None,
        *,
        world: World,
        precision: Precision,
        num_steps: int,
        hooks: Hooks,
        last_step: int = 0,
        requests: Requests | None = None,
        has_values: bool = True,
    ) -> None:
        """`has_values`: tensors have, which can be looked at; not in a plan."""
        self.recipe = recipe
        self.options = options
        self.strategy = strategy
        self.batches = batches
        self.evaluator = evaluator
        self.world = world
        self.precision = precision
        self.num_steps = num_steps
        self.last_step = last_step or num_steps
        self.hooks = hooks
        requests = self.requests = requests or Requests()
        step_polls = Polls(world.peers, lambda: requests.now().stop and not requests.may_finish_step())
        self._evaluation_polls = Polls(world.peers, lambda: requests.now().stop)
        self.clock = Clock(recipe=recipe, steps_per_epoch=batches.plan.steps_per_epoch, num_steps=num_steps)
        self.averaging = Averaging(options, strategy, num_steps=num_steps)
        logs = self._logs = LogSums(world)
        self.sums = StepSums(world, requests, PartTimes(world), logs)
        self.updater = Updater(
            recipe,
            options,
            strategy,
            world=world,
            precision=precision,
            clock=self.clock,
            sums=self.sums,
            logs=logs,
            poll=step_polls,
            has_values=has_values,
        )

    def run(self, position: Position, *, end: int) -> str:
        """Train from `position` to step `end` and save there. All ranks.

        When a rank is asked to stop, all save and return after the same step. Returns what asked for it, or "".
        """
        if self.precision.loss_scale is not None and position.loss_scale:
            self.precision.loss_scale.restore(position.loss_scale)
        self.strategy.exact_exponents = position.exact_exponents
        for model in self.strategy.replicas:
            train_mode(model)
        if position.is_evaluation_due:
            cause = self._end_step(position, end, Asked())
            if cause or position.is_finished:
                return cause
        begun = time.perf_counter()
        start, is_first = position.step, True
        progress.begin(DATA)
        batches = self.batches.steps(position.step, end)
        upcoming = self.sums.counted(next(batches, None))
        self.updater.judge.restore(position.recent_losses)
        references = ReferencesStay(self.recipe)
        left_out = {step for each in position.left_out for step in range(each.first, each.last + 1)}
        while upcoming.batch is not None:
            self.requests.time_left.step_begins()
            if position.step + 1 in left_out:
                self._logs.begin()
                left_out_loss = torch.zeros(())
                following = self.sums.begin(position.step, left_out_loss, next(batches, None))().upcoming
                assert following is not None
                upcoming = following
                position.step += 1
                self.hooks.on_left_out(position.step)
            else:
                try:
                    report, upcoming = self.train_step(upcoming, batches, begun)
                except BrokenOff:
                    if position.step > start:
                        self._save(position)
                    return self.requests.met()
                position.step += 1
                if is_first:
                    # Fails now if the optimizer's state cannot be saved.
                    specs = [fragment.spec for fragment in self.strategy.state()]
                    to_come = self.averaging.bytes_to_come(specs)
                    self.hooks.on_first_state(sum(spec.num_bytes for spec in specs) + to_come)
                self.requests.time_left.step_took(report.step_s)
                self.hooks.on_step(position.step, report)
                if is_first:
                    references.check()
                    is_first = False
            cause = self._end_step(position, end, upcoming.asked)
            if cause or position.is_finished:
                return cause
            begun = time.perf_counter()
        return ""

    def _end_step(self, position: Position, end: int, asked: Asked) -> str:
        """Evaluate and save if due; return what asks the run to stop before its end, or "". All ranks.

        A run that stops does not evaluate first: its next start does.
        """
        has_improved = False
        position.is_evaluation_due = self._is_evaluation_due(position)
        if position.is_evaluation_due:
            try:
                has_improved = not asked.stop and self._evaluate(position)
            except BrokenOff:
                asked = asked._replace(stop=True)
        position.is_finished = not position.is_evaluation_due and (
            position.has_stopped_early or position.step == self.last_step
        )
        every = self.options.save_every
        is_multiple = isinstance(every, int) and every > 0 and position.step % every == 0
        is_due = position.step == end or position.is_finished or is_multiple
        if is_due or any(asked) or (has_improved and self.options.save_on_best):
            self._save(position)
        elif self.options.replicate_every and position.step % self.options.replicate_every == 0:
            self._note_state(position)
            self.hooks.replicate(position)
        cause = self.requests.met() if any(asked) else ""
        return cause if asked.stop and not position.is_finished else ""

    def train_step(
        self, counted: CountedBatch, batches: Iterator[GlobalBatch], begun: float
    ) -> tuple[StepReport, CountedBatch]:
        """Train on one global batch and load the next. All ranks.

        The next batch's counts are summed over the ranks with this batch's loss: one small collective per update.
        Raises UserError or RollBack on all ranks when the loss or gradient is bad, BrokenOff between two micro-batches
        if the run has no time left to finish the step; the state is then that before the step.
        """
        batch = counted.batch
        assert batch is not None
        updates = Updates(self.updater, counted, batches)
        self.recipe.moment = self.updater.clock.at(batch.step)
        step: Callable[[Updates], object] = self.recipe.step
        returned = step(updates)
        upcoming = updates.end()
        if returned is not None:
            raise UserError(
                f"the recipe's step() returns a {type(returned).__name__}, which nothing would use: it must return "
                f"None. A loss is what the function given to update() returns"
            )
        if not updates.is_skipped:
            self.averaging.update(batch.step + 1, num_samples=batch.num_samples)
        every = self.options.digest_every
        is_due = every > 0 and (batch.step + 1) % every == 0
        digests = digests_of_state(self.strategy.state(), self.world.peers) if is_due else {}
        report = StepReport(
            loss=updates.loss,
            lr=updates.lr,
            grad_norm=updates.norm,
            samples=batch.num_samples,
            tokens=counted.num_tokens,
            step_s=time.perf_counter() - begun,
            is_skipped=updates.is_skipped,
            ranks=spread(upcoming.times),
            slowest=slowest(upcoming.times, is_sharded=self.strategy.is_sharded),
            digests=digests,
            logged=updates.logged,
        )
        progress.begin(BETWEEN_STEPS)
        return report, upcoming

    def _is_evaluation_due(self, position: Position) -> bool:
        every = self.options.eval_every or self.batches.plan.steps_per_epoch
        is_due = position.step % every == 0 or position.step == self.last_step or position.is_evaluation_due
        return self.evaluator is not None and is_due

    def _evaluate(self, position: Position) -> bool:
        """Evaluate, update the best value, and return whether it improved. Raises BrokenOff if asked to stop."""
        assert self.evaluator is not None
        self.clock.set(position.step, is_evaluation=True)
        self._evaluation_polls.begin()
        results = self.averaging.evaluate(self.evaluator, self.hooks.on_evaluating, self._evaluation_polls)
        position.is_evaluation_due = False
        self.hooks.on_evaluation(position.step, results)
        name = best_metric_in(results, self.recipe.best_metric)
        if not name:  # it is one of an average that has not begun
            return False
        shown = name.removeprefix(EVAL_PREFIX)
        if position.best_metric != shown:  # the best metric has changed
            position.best_value, position.evaluations_since_best = None, 0
            position.best_metric = shown
        value, best = results[name], position.best_value
        is_better = best is None or (value > best if self.evaluator.higher_is_better else value < best)
        if is_better and math.isfinite(value):
            position.best_value, position.best_step, position.evaluations_since_best = value, position.step, 0
            return True
        position.evaluations_since_best += 1
        patience = self.options.early_stopping_patience
        position.has_stopped_early = bool(patience) and position.evaluations_since_best >= patience
        return False

    def _save(self, position: Position) -> None:
        self._note_state(position)
        self.hooks.save(position)

    def _note_state(self, position: Position) -> None:
        position.recent_losses = self.updater.judge.recent
        position.callbacks = self.hooks.states()
        position.exact_exponents = dict(sorted(self.strategy.exact_exponents.items()))
        position.num_averaged = self.averaging.num_averaged
        if self.precision.loss_scale is not None:
            position.loss_scale = self.precision.loss_scale.state()

"""The training loop: steps and micro-batches. Ranks and strategies are hidden behind `World` and `Strategy`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.state_digests import digests_of_state
from shardlaunch.launcher.optimization.freezing import train_mode
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.recorder import StepReport
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX
from shardlaunch.launcher.seeding import seed_model_stream
from shardlaunch.launcher.training.averaging import Averaging, best_metric_in
from shardlaunch.launcher.training.bad_numbers import Judge
from shardlaunch.launcher.training.batches import Batches, GlobalBatch
from shardlaunch.launcher.training.clock import Clock
from shardlaunch.launcher.training.evaluation import Evaluation, Evaluator
from shardlaunch.launcher.training.forward import forward
from shardlaunch.launcher.training.in_place import parameters_stay
from shardlaunch.launcher.training.log_sums import LogSums
from shardlaunch.launcher.training.slow_ranks import PartTimes, RankTimes, slowest, spread
from shardlaunch.launcher.training.stopping import Asked, BrokenOff, Polls, Requests
from shardlaunch.progress import BACKWARD, BETWEEN_STEPS, DATA, FORWARD, WAITING, progress
from shardlaunch.sharding.buffers import BufferMean
from shardlaunch.sharding.exact import NUM_PARTS, summands
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
        self.forward = forward
        # The first forward pass is looked into; a compiled one cannot be.
        self._is_forward_checked = options.compile or not has_values
        self.num_steps = num_steps
        self.last_step = last_step or num_steps
        self.hooks = hooks
        self.judge = Judge(options, has_loss_scale=precision.loss_scale is not None)
        requests = self.requests = requests or Requests()
        self._step_polls = Polls(world.peers, lambda: requests.now().stop and not requests.may_finish_step())
        self._evaluation_polls = Polls(world.peers, lambda: requests.now().stop)
        self.clock = Clock(recipe=recipe, steps_per_epoch=batches.plan.steps_per_epoch, num_steps=num_steps)
        self.part_times = PartTimes(world)
        self.averaging = Averaging(options, strategy, num_steps=num_steps)
        self.buffers = BufferMean(strategy.replicas, world=world, exact=options.exact)
        self._summands = summands if options.exact else _as_one
        self._logs = LogSums(world)
        self._takes_logs = has_values
        self.peak_lrs = [group["lr"] for group in strategy.optimizer.param_groups]
        # Report the run's own learning rate, not that of a single parameter group.
        self.peak_lr = options.lr if options.lr in self.peak_lrs else float(max(self.peak_lrs))

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
        upcoming = self._counted(next(batches, None))
        self.judge.restore(position.recent_losses)
        left_out = {step for each in position.left_out for step in range(each.first, each.last + 1)}
        while upcoming.batch is not None:
            self.requests.time_left.step_begins()
            if position.step + 1 in left_out:
                self._logs.begin()
                upcoming = self._begin_sums(position.step, torch.zeros(()), next(batches, None))().upcoming
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
                    is_first = False
                self.requests.time_left.step_took(report.step_s)
                self.hooks.on_step(position.step, report)
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
        self, counted: "CountedBatch", batches: Iterator[GlobalBatch], begun: float
    ) -> tuple[StepReport, "CountedBatch"]:
        """Train on one global batch and load the next. All ranks.

        The next batch's counts are summed over the ranks with this batch's loss: one small collective per step. Raises
        UserError or RollBack on all ranks when the loss or gradient is bad, BrokenOff between two micro-batches if the
        run has no time left to finish the step; the state is then that before the step.
        """
        batch, num_targets = counted.batch, max(1, counted.num_targets)
        assert batch is not None
        last = len(batch.micro_batches) - 1
        scale = self.precision.loss_scale.value if self.precision.loss_scale is not None else 1.0
        replicas, devices = self.strategy.replicas, self.strategy.devices
        moment = self.clock.at(batch.step)
        sums: Callable[[], Sums] | None = None
        while True:
            total: torch.Tensor | None = None
            self._logs.begin()
            self.buffers.begin_step()
            for slot, micro_batch in enumerate(batch.micro_batches):
                if slot:
                    self._step_polls()
                model, device = replicas[slot % len(replicas)], devices[slot % len(replicas)]
                progress.begin_slot(FORWARD, batch.step + 1, slot, last + 1)
                seed_model_stream(self.options.seed, batch.step, micro_batch.index, device)
                self.recipe.moment = moment
                with nullcontext() if self._is_forward_checked else parameters_stay(model):
                    _, _, loss, logged = self.forward(self.recipe, model, micro_batch, self.precision, device)
                self._is_forward_checked = True
                if micro_batch.weight:
                    summand = self._summands(loss.detach())
                    total = summand if total is None else total + summand.to(total.device)
                    if logged and self._takes_logs:
                        self._logs.add(logged)
                if slot == last and sums is None:
                    progress.begin(DATA)
                    following = next(batches, None)
                    sums = self._begin_sums(batch.step, total, following)
                factor = micro_batch.weight * scale / num_targets
                progress.begin(BACKWARD)
                self.strategy.backward(loss, factor=factor, last=slot == last)
                self.buffers.end_micro_batch(model, index=micro_batch.index, weight=micro_batch.weight)
            progress.begin(WAITING)
            if not self.strategy.must_repeat():
                break
        norm = self.strategy.finish_gradients(unscale=1.0 / scale, max_norm=self.options.max_grad_norm)
        assert sums is not None
        loss_sum, upcoming, logged_values = sums()
        loss_value = loss_sum / num_targets
        is_bad = self.judge.skips(batch.step + 1, loss_value, norm)
        is_skipped = is_bad or self._is_scaled_too_high(norm)
        lr = self._set_lr(batch.step)
        if is_skipped:
            self.strategy.discard()
        else:
            self.strategy.optimizer_step()
        if not is_bad:  # buffers too would be
            self.buffers.end_step(num_micro_batches=batch.num_micro_batches)
        if not is_skipped:
            self.averaging.update(batch.step + 1, num_samples=batch.num_samples)
        every = self.options.digest_every
        is_due = every > 0 and (batch.step + 1) % every == 0
        digests = digests_of_state(self.strategy.state(), self.world.peers) if is_due else {}
        report = StepReport(
            loss=loss_value,
            lr=lr,
            grad_norm=norm,
            samples=batch.num_samples,
            tokens=counted.num_tokens,
            step_s=time.perf_counter() - begun,
            is_skipped=is_skipped,
            ranks=spread(upcoming.times),
            slowest=slowest(upcoming.times, is_sharded=self.strategy.is_sharded),
            digests=digests,
            logged=logged_values,
        )
        progress.begin(BETWEEN_STEPS)
        return report, upcoming

    def _begin_sums(self, step: int, loss: torch.Tensor | None, following: GlobalBatch | None) -> Callable[[], "Sums"]:
        """Start to sum this step's loss and what is logged, and the next batch's counts. All ranks.

        Returns a function to get them.
        """
        counts = _counts(following)
        asked = self.requests.now()
        if self.world.size == 1:
            assert loss is not None
            logged = self._logs.of_one_rank()
            return lambda: Sums(sum(loss.reshape(-1).tolist()), CountedBatch(following, *counts, asked), logged())
        # float64 holds the loss and integers up to 2**53 exactly.
        times = self.part_times.of_all(step)
        logs = slice(first := NUM_PARTS + len(counts) + len(asked), first + self._logs.num_numbers)
        sums = torch.tensor(
            [*[0.0] * NUM_PARTS, *counts, *asked, *[0.0] * self._logs.num_numbers, *times],
            dtype=torch.float64,
            device=self.world.device,
        )
        if self.world.is_counted:
            if loss is not None:
                sums[: loss.numel()] = loss
            self._logs.put(sums[logs])
        else:
            sums[: NUM_PARTS + len(counts)] = 0
        work = self.world.begin_sum(sums)

        def finish() -> Sums:
            assert work is not None
            work.wait()
            numbers = sums.tolist()
            num_targets, num_tokens, *asked = numbers[NUM_PARTS : logs.start]
            counted = CountedBatch(
                following,
                int(num_targets),
                int(num_tokens),
                Asked(*(each > 0 for each in asked)),
                self.part_times.by_part(numbers[logs.stop :]),
            )
            return Sums(sum(numbers[:NUM_PARTS]), counted, self._logs.values(numbers[logs]))

        return finish

    def _counted(self, batch: GlobalBatch | None) -> "CountedBatch":
        """Return the first batch with its counts over all ranks. All ranks."""
        counts = self.world.sum_of_data(torch.tensor(_counts(batch), device=self.world.device))
        return CountedBatch(batch, *counts.tolist())

    def _is_scaled_too_high(self, norm: float) -> bool:
        """Return whether the loss scale is too high for this step, and adapt it. The same on all ranks."""
        if self.precision.loss_scale is None:
            return False
        overflow = not math.isfinite(norm)
        self.precision.loss_scale.update(overflow=overflow)
        return overflow

    def _set_lr(self, step: int) -> float:
        factor = self.recipe.schedule(step, self.num_steps)
        for group, peak in zip(self.strategy.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        return self.peak_lr * factor

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
        position.recent_losses = self.judge.recent
        position.callbacks = self.hooks.states()
        position.exact_exponents = dict(sorted(self.strategy.exact_exponents.items()))
        position.num_averaged = self.averaging.num_averaged
        if self.precision.loss_scale is not None:
            position.loss_scale = self.precision.loss_scale.state()


def _as_one(loss: torch.Tensor) -> torch.Tensor:
    """Return a loss as what it adds to a sum."""
    return loss


class CountedBatch(NamedTuple):
    """This rank's micro-batches of a global batch (None: the run is over), and what all ranks know of it."""

    batch: GlobalBatch | None
    num_targets: int
    num_tokens: int
    asked: Asked = Asked()
    """What any rank has been asked for, before this batch."""
    times: RankTimes = MappingProxyType({})
    """Times of the ranks until this batch, where a report is due."""


class Sums(NamedTuple):
    """What a step sums over the ranks: its loss, the counts of the next batch, and the values logged, by name."""

    loss: float
    upcoming: CountedBatch
    logged: dict[str, float]


def _counts(batch: GlobalBatch | None) -> tuple[int, int]:
    """Return this rank's (num_targets, num_tokens)."""
    micro_batches = batch.micro_batches if batch is not None else []
    return (
        sum(m.weight * m.num_targets for m in micro_batches),
        sum(m.weight * m.num_tokens for m in micro_batches),
    )

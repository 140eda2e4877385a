"""Updates: each runs the micro-batches of a global batch, sums their gradients over the ranks, and applies them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from zlib import crc32

import torch
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, has_own_step
from shardlaunch.launcher.seeding import derive_seed, seed_model_stream
from shardlaunch.launcher.step import Embed, LossOf, LossOfRows, Step
from shardlaunch.launcher.training.bad_numbers import Judge
from shardlaunch.launcher.training.batches import GlobalBatch
from shardlaunch.launcher.training.clock import Clock
from shardlaunch.launcher.training.forward import forward, source_of
from shardlaunch.launcher.training.in_place import parameters_stay
from shardlaunch.launcher.training.log_sums import LogSums
from shardlaunch.launcher.training.rows import Rows
from shardlaunch.launcher.training.step_sums import CountedBatch, StepSums, Sums
from shardlaunch.progress import BACKWARD, DATA, FORWARD, WAITING, progress
from shardlaunch.sharding.buffers import BufferMean
from shardlaunch.sharding.exact import summands
from shardlaunch.sharding.optimizers import ONLY_ONE, optimizers_by_name
from shardlaunch.sharding.precision import Precision
from shardlaunch.sharding.shards import local_shard
from shardlaunch.sharding.strategy import Strategy
from shardlaunch.sharding.world import World


class Updater:
    """What all updates of a run share."""

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        strategy: Strategy,
        *,
        world: World,
        precision: Precision,
        clock: Clock,
        sums: StepSums,
        logs: LogSums,
        poll: Callable[[], None],
        has_values: bool,
    ) -> None:
        """`poll` may raise BrokenOff while the state is that before the step. `has_values`: see `Trainer`."""
        self.recipe = recipe
        self.options = options
        self.strategy = strategy
        self.world = world
        self.precision = precision
        self.clock = clock
        self.sums = sums
        self.logs = logs
        self.poll = poll
        self.takes_logs = has_values
        self.has_own_step = has_own_step(type(recipe))
        self.forward = forward
        # The first forward pass of each loss is looked into; a compiled one cannot be.
        self.looks_into_passes = has_values and not options.compile
        self.checked: set[tuple[str, str]] = set()
        self.judge = Judge(options, has_loss_scale=precision.loss_scale is not None)
        self.buffers = BufferMean(strategy.replicas, world=world, exact=options.exact)
        self.summands = summands if options.exact else _as_one
        self.optimizers = optimizers_by_name(strategy.optimizer)
        self._peak_lrs = [group["lr"] for group in strategy.optimizer.param_groups]
        # Report the run's own learning rate, not that of a single parameter group.
        self._peak_lr = options.lr if options.lr in self._peak_lrs else float(max(self._peak_lrs))

    def set_lr(self, step: int) -> float:
        """Set the learning rates of a step, and return that of the run."""
        factor = self.recipe.schedule(step, self.clock.num_steps)
        for group, peak in zip(self.strategy.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor
        return self._peak_lr * factor

    def is_scaled_too_high(self, norm: float) -> bool:
        """Return whether the loss scale is too high for this update, and adapt it. The same on all ranks."""
        if self.precision.loss_scale is None:
            return False
        overflow = not math.isfinite(norm)
        self.precision.loss_scale.update(overflow=overflow)
        return overflow


class Updates(Step):
    """The updates of one step, from one global batch."""

    loss = norm = lr = math.nan
    """Of the last update."""
    is_skipped = False
    """An update was skipped."""

    def __init__(self, updater: Updater, counted: CountedBatch, batches: Iterator[GlobalBatch]) -> None:
        assert counted.batch is not None
        self._run = updater
        self._batch = counted.batch
        self._denominators = counted.denominators
        self._batches = batches
        self._moment = updater.clock.at(counted.batch.step)
        self.num_updates = 0
        self.logged: dict[str, float] = {}
        """Values by name, each of the last update that has logged it."""
        self.upcoming: CountedBatch | None = None
        """The next batch: the first update loads it, and sums its counts over the ranks with the loss."""

    def update(
        self,
        loss: LossOf | LossOfRows | None = None,
        *,
        optimizer: str = ONLY_ONE,
        embed: Embed | None = None,
    ) -> float:
        """Update once (see `Step`)."""
        run, batch = self._run, self._batch
        self._check(loss, optimizer, embed)
        self._agree(f"update {self.num_updates + 1}, by {optimizer or 'its optimizer'} of {source_of(loss)}")
        scale = run.precision.loss_scale.value if run.precision.loss_scale is not None else 1.0
        with run.strategy.updating(optimizer):
            divisor, sums = self._accumulate(loss, optimizer, embed, scale)
            norm = run.strategy.finish_gradients(unscale=1.0 / scale, max_norm=run.options.max_grad_norm)
            found = sums()
            if found.upcoming is not None:
                self.upcoming = found.upcoming
            loss_value = found.loss / divisor
            is_bad = run.judge.skips(batch.step + 1, loss_value, norm)
            is_skipped = is_bad or run.is_scaled_too_high(norm)
            if not self.num_updates:
                self.lr = run.set_lr(batch.step)
            if is_skipped:
                run.strategy.discard()
            else:
                run.strategy.optimizer_step()
        if not is_bad:  # buffers too would be
            run.buffers.end_step(num_micro_batches=batch.num_micro_batches)
        self.num_updates += 1
        self.is_skipped |= is_skipped
        self.logged |= found.logged
        self.loss, self.norm = loss_value, norm
        return loss_value

    def gradient_of(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return a gradient with its graph (see `Step`)."""
        strategy = self._run.strategy
        if not strategy.differentiates_twice:
            raise UserError(
                "gradient_of(): not under zero3, which has dropped the weights before the second backward pass; use "
                "--strategy fsdp2, or zero2"
            )
        if self._run.options.compile:
            raise UserError("gradient_of(): not with --compile, which cannot differentiate twice; remove it")
        if not inputs.requires_grad:
            raise UserError(
                "gradient_of(): its inputs need no gradient; call requires_grad_() on them before the model takes them"
            )
        with strategy.keeping_graph():
            (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        return gradient

    def _accumulate(
        self, loss: Any, optimizer: str, embed: Embed | None, scale: float
    ) -> tuple[int, Callable[[], Sums]]:
        """Run the micro-batches. Return what the sum of losses is to be divided by, and a function to get the sums."""
        run, batch = self._run, self._batch
        last = len(batch.micro_batches) - 1
        replicas, devices = run.strategy.replicas, run.strategy.devices
        num_targets = max(1, self._denominators.num_targets)
        label = (optimizer, source_of(loss))
        is_first = run.looks_into_passes and label not in run.checked
        run.logs.begin()
        rows = self._rows(embed, loss, is_looked_into=is_first) if embed is not None else None
        sums: Callable[[], Sums] | None = None
        while True:
            total: torch.Tensor | None = None
            run.buffers.begin_step()
            for slot, micro_batch in enumerate(batch.micro_batches):
                if slot and not self.num_updates:
                    run.poll()
                model, device = replicas[slot % len(replicas)], devices[slot % len(replicas)]
                progress.begin_slot(FORWARD, batch.step + 1, slot, last + 1)
                self._seed(micro_batch.index, device)
                run.recipe.moment = self._moment
                with parameters_stay(model) if is_first else nullcontext():
                    done = run.forward(
                        run.recipe,
                        model,
                        micro_batch,
                        run.precision,
                        device,
                        loss_of=loss if rows is None else rows.propagating(micro_batch),
                        denominators=self._denominators,
                    )
                if is_first and loss is not None:
                    self._check_pass(model, done.loss, optimizer, source_of(loss if embed is None else embed))
                is_first = False
                run.checked.add(label)
                divisor = 1 if done.names or rows is not None else num_targets
                if micro_batch.weight:
                    summand = run.summands(done.loss.detach() if rows is None else rows.losses[slot])
                    total = summand if total is None else total + summand.to(total.device)
                    if done.logged and run.takes_logs:
                        run.logs.add(done.logged)
                if slot == last and sums is None:
                    sums = self._begin_sums(total)
                progress.begin(BACKWARD)
                with _explained_errors():
                    run.strategy.backward(done.loss, factor=micro_batch.weight * scale / divisor, last=slot == last)
                run.buffers.end_micro_batch(model, index=micro_batch.index, weight=micro_batch.weight)
            progress.begin(WAITING)
            if not run.strategy.must_repeat():
                assert sums is not None
                return divisor, sums
            run.logs.begin()

    def _rows(self, embed: Embed, loss: Any, *, is_looked_into: bool) -> Rows:
        self._run.recipe.moment = self._moment
        return Rows(self._run, self._batch, embed, loss, self._denominators, self._seed, is_looked_into=is_looked_into)

    def _begin_sums(self, total: torch.Tensor | None) -> Callable[[], Sums]:
        """Start to sum the loss over the ranks; with the first update's, the counts of the next batch. All ranks."""
        sums, step = self._run.sums, self._batch.step
        if self.num_updates:
            return sums.begin_further(total)
        progress.begin(DATA)
        return sums.begin(step, total, next(self._batches, None))

    def end(self) -> CountedBatch:
        """End the step and return the next batch. All ranks. Raises UserError if it had no update."""
        self._agree("the end of the step")
        if self.upcoming is None:
            raise UserError(
                "the recipe's step() makes no update: it must call update(...) of what it is given, on all ranks"
            )
        return self.upcoming

    def _agree(self, what: str) -> None:
        """Raise UserError unless all ranks do the same next, of what a recipe decides. All ranks."""
        if not self._run.has_own_step:
            return
        code = crc32(what.encode())
        most, least = self._run.world.peers.most([code, -code])
        if most != code or -least != code:
            raise UserError(
                f"step {self._batch.step + 1}: the ranks do not make the same updates in the recipe's step(); here "
                f"{what} comes. What decides on them must be the same on all ranks: self.moment, self.options, what "
                f"update() returns"
            )

    def _seed(self, micro_batch: int, device: torch.device) -> None:
        """Seed the generators for a micro-batch: each update of a step draws other numbers."""
        seed = self._run.options.seed
        if self.num_updates:
            seed = derive_seed(seed, "update", self.num_updates)
        seed_model_stream(seed, self._batch.step, micro_batch, device)

    def _check(self, loss: Any, optimizer: str, embed: Embed | None) -> None:
        """Raise UserError for arguments of update() that are none."""
        known = self._run.optimizers
        if optimizer not in known:
            names = ", ".join(map(repr, known))
            raise UserError(
                f"update(optimizer={optimizer!r}): the recipe's optimizer() returns no such optimizer; "
                + (f"choose one of {names}" if ONLY_ONE not in known else "it returns one, which needs no name")
            )
        if not (loss is None or callable(loss)):
            raise UserError(
                f"update(): takes a function that returns the loss of a micro-batch, not a {type(loss).__name__}: "
                f"update(self.my_loss), where my_loss(model, batch) returns the sum over its targets"
            )
        if embed is not None and loss is None:
            raise UserError("update(embed=...): needs a function loss(rows, all_rows, first) too")

    def _check_pass(self, model: nn.Module, loss: torch.Tensor, optimizer: str, source: str) -> None:
        """Raise UserError for a loss that cannot be differentiated, or was already."""
        if not loss.requires_grad:
            part = f" that the optimizer {optimizer!r} updates" if optimizer else ""
            raise UserError(
                f"the loss of {source} does not depend on a trained parameter{part}: is something detached, or the "
                f"wrong optimizer named?"
            )
        has_gradient = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and bool(local_shard(parameter.grad).any())
        ]
        if has_gradient:
            raise UserError(
                f"{source} has left gradients in {some(has_gradient)}: it must return its loss, not call backward(). "
                f"For a gradient in a loss use step.gradient_of(outputs, inputs)"
            )


@contextmanager
def _explained_errors() -> Iterator[None]:
    """Raise UserError for known errors of torch within a backward pass."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "double backward" in text:
            raise UserError(
                "the loss contains a gradient of the model, which --compile cannot differentiate; remove it"
            ) from error
        if "storage of size 0" in text:
            raise UserError(
                "the loss contains a gradient of the model, whose weights are in shards again: compute it by "
                "step.gradient_of(outputs, inputs) instead of torch.autograd.grad"
            ) from error
        if "backward through the graph a second time" in text:
            raise UserError(
                "a backward pass through the loss has been done already: a loss must be returned, without a call of "
                "backward(), and not be kept from one micro-batch to the next"
            ) from error
        if "does not require grad" in text:
            raise UserError(
                "the loss of a micro-batch does not depend on a trained parameter. Where a micro-batch has no targets, "
                "return the sum over none of the outputs, such as outputs[mask].sum()"
            ) from error
        raise


def _as_one(loss: torch.Tensor) -> torch.Tensor:
    """Return a loss as what it adds to a sum."""
    return loss

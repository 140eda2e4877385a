"""Evaluation: every sample once, spread over the ranks, with the same metrics on any number of ranks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.logged import collecting
from shardlaunch.launcher.optimization.freezing import train_mode
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.tracking import EMA_PREFIX, EVAL_PREFIX
from shardlaunch.launcher.seeding import derive_seed, seed_model_stream
from shardlaunch.launcher.training.batches import Batches
from shardlaunch.launcher.training.exact_metrics import ExactMetrics, with_nested
from shardlaunch.launcher.training.forward import forward
from shardlaunch.launcher.training.log_sums import LogSums
from shardlaunch.progress import EVALUATION, EVALUATION_DATA, EVALUATION_RESULTS, progress
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.exact import NUM_PARTS, summands
from shardlaunch.sharding.precision import Precision
from shardlaunch.sharding.world import World

Evaluation = dict[str, Any]


class Evaluator:
    """Evaluate a model on the held-out data."""

    def __init__(self, recipe: Recipe, batches: Batches, *, world: World, precision: Precision) -> None:
        self._recipe = recipe
        self._batches = batches
        self._world = world
        self._precision = precision
        self._seed = derive_seed(recipe.options.seed, "evaluation")
        self._metrics = {name: metric.to(world.device) for name, metric in recipe.metrics().items()}
        self._is_exact = recipe.options.exact
        self._logs = LogSums(world)
        self._loss_names: tuple[str, ...] | None = None

    @property
    def higher_is_better(self) -> bool:
        """Return whether a higher best metric is better. Raises UserError when that is unknown."""
        name = self._best_metric
        if name == "loss":
            return False
        if name not in self._metrics:
            raise UserError(f"unknown best_metric {name!r}; available: {', '.join(['loss', *self._metrics])}")
        if self._metrics[name].higher_is_better is None:
            raise UserError(
                f"best_metric {name!r} does not say whether higher is better: set the attribute higher_is_better of "
                f"its class, or choose another (with --metrics: the first one)"
            )
        return bool(self._metrics[name].higher_is_better)

    @property
    def _best_metric(self) -> str:
        """Return the name of the best metric among the recipe's. Raises UserError if it is of what is not evaluated."""
        wanted, options = self._recipe.best_metric, self._recipe.options
        if wanted in self._metrics:
            return wanted
        if wanted.startswith(EMA_PREFIX) and not options.keeps_average:
            raise UserError(
                f"best_metric {wanted!r}: this run keeps no average of its weights; set --ema, or name another"
            )
        if wanted.startswith(EVAL_PREFIX) and options.keeps_average and options.eval_ema == "only":
            raise UserError(
                f"best_metric {wanted!r}: --eval-ema only leaves the weights out; remove it, or name another"
            )
        return wanted.removeprefix(EVAL_PREFIX).removeprefix(EMA_PREFIX)

    def rehearse(self, model: nn.Module) -> None:
        """Evaluate one batch, to find errors before any training. All ranks."""
        self._evaluate(model, 1, lambda done, of: None, lambda: None)

    def evaluate(
        self, model: nn.Module, on_progress: Callable[[int, int], None], poll: Callable[[], None]
    ) -> Evaluation:
        """Return the mean loss per target and the recipe's metrics: numbers, or nested lists (a matrix). All ranks.

        `on_progress` is called with the number of samples done and the total, `poll` after each micro-batch, on all
        ranks equally often: it may raise.
        """
        return self._evaluate(model, self._batches.plan.steps_per_epoch, on_progress, poll)

    @torch.no_grad()
    def _evaluate(
        self,
        model: nn.Module,
        num_steps: int,
        on_progress: Callable[[int, int], None],
        poll: Callable[[], None],
    ) -> Evaluation:
        model.eval()
        start = {name: buffer.clone() for name, buffer in persistent_buffers(model).items()}
        for metric in self._metrics.values():
            metric.reset()
        exact = ExactMetrics(self._metrics, world=self._world) if self._is_exact else None
        try:
            sums = self._predict(model, num_steps, on_progress, poll, exact)
            progress.begin(EVALUATION_RESULTS)
        finally:
            for name, buffer in start.items():  # an evaluation does not change the model
                model.get_buffer(name).copy_(buffer)
            train_mode(model)
        plan = self._batches.plan
        if exact is not None:
            exact.finish()
        else:
            _keep_rows(self._metrics)
            if not self._world.is_counted:
                _empty(self._metrics)
        numbers = self._world.sum_of_data(sums).tolist()
        *loss_parts, num_targets = numbers[: NUM_PARTS + 1]
        loss = sum(loss_parts)
        results: Evaluation = {"loss": loss / num_targets if num_targets else math.nan}
        logged = self._logs.values(numbers[NUM_PARTS + 1 :])
        if self._loss_names:
            results["loss"] = sum(logged.get(name, 0.0) for name in self._loss_names)
        for name, metric in self._metrics.items():
            try:
                value = metric.compute()
            except ValueError as error:
                if num_steps < plan.steps_per_epoch:  # some metrics need more samples than a rehearsal has
                    continue
                raise UserError(f"metric {name!r} cannot be computed on the evaluation data: {error}") from error
            if not isinstance(value, torch.Tensor) or (name == self._best_metric and value.numel() != 1):
                what = "one number" if name == self._best_metric else "a tensor"
                raise UserError(f"the recipe's metric {name!r} must return {what}, not {value!r}")
            results[name] = value.item() if value.numel() == 1 else value.tolist()
        if both := logged.keys() & self._metrics.keys():
            raise UserError(f"self.log({min(both)!r}, ...): is the name of a metric of the recipe too; choose another")
        return results | logged

    def _note_names(self, names: tuple[str, ...]) -> None:
        """Note the names of several losses, each of which is a mean of its own. Raises UserError if they change."""
        if self._loss_names is None:
            self._loss_names = names
        elif names != self._loss_names:
            raise UserError(
                f"the recipe's loss() must return the same losses for each batch; it returned {some(self._loss_names)} "
                f"for one and {some(names)} for another"
            )

    def _predict(
        self,
        model: nn.Module,
        num_steps: int,
        on_progress: Callable[[int, int], None],
        poll: Callable[[], None],
        exact: ExactMetrics | None,
    ) -> torch.Tensor:
        """Update the metrics with this rank's batches.

        Return the sums of its losses, in parts, its targets, and what it has logged.
        """
        has_work = False
        num_done = 0
        first_log = NUM_PARTS + 1
        sums = torch.zeros(first_log + self._logs.num_numbers, dtype=torch.float64, device=self._world.device)
        self._logs.begin()
        progress.begin(EVALUATION_DATA)
        for batch in self._batches.steps(0, num_steps):
            for slot, micro_batch in enumerate(batch.micro_batches):
                progress.begin_slot(EVALUATION, batch.step + 1, slot, len(batch.micro_batches))
                seed_model_stream(self._seed, batch.step, micro_batch.index, self._world.device)
                inputs, outputs, loss, logged, names = forward(
                    self._recipe, model, micro_batch, self._precision, self._world.device
                )
                self._note_names(names)
                if micro_batch.weight:
                    if exact is None:
                        sums[0] += loss
                    else:
                        sums[:NUM_PARTS] += summands(loss)
                    sums[NUM_PARTS] += micro_batch.num_targets
                    self._logs.add(logged)
                    with collecting(self._recipe) as logged:
                        self._recipe.update_metrics(self._metrics, outputs, inputs)
                    self._logs.add(logged)
                    has_work = True
                    if exact is not None:
                        exact.add((batch.step, micro_batch.index))
                elif not has_work and exact is None:
                    with collecting(self._recipe):
                        self._recipe.update_metrics(self._metrics, outputs, inputs)
                    _keep_rows(self._metrics)
                    _empty(self._metrics)
                poll()
            num_done += batch.num_samples
            on_progress(num_done, self._batches.plan.num_samples)
            progress.begin(EVALUATION_DATA)
        self._logs.put(sums[first_log:])
        return sums


def _empty(metrics: Mapping[str, Any]) -> None:
    """Remove what is not to be counted from the metrics of a rank: a repeated batch, or the data of another rank.

    Shapes and dtypes stay.
    torchmetrics gathers a metric's lists from all ranks, which fails if a rank has never updated the metric.
    """
    for metric in with_nested(metrics):
        for name, default in metric._defaults.items():
            value = getattr(metric, name)
            is_list = isinstance(value, list)
            setattr(metric, name, [item[:0] for item in value] if is_list else default.clone().to(value.device))


def _keep_rows(metrics: Mapping[str, Any]) -> None:
    """Turn scalars that a metric keeps in lists into rows.

    torchmetrics gathers scalars and rows by different collectives: ranks with one, several or no scalars would hang.
    """
    for metric in with_nested(metrics):
        for name in metric._defaults:
            if isinstance(getattr(metric, name), list):
                setattr(metric, name, [torch.atleast_1d(item) for item in getattr(metric, name)])

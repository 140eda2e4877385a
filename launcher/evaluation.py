"""Evaluation: every sample once, sharded over the ranks, the same metrics on any number of them."""

from collections.abc import Callable

import torch
from torch import nn

from shardlaunch.launcher.batches import Batches
from shardlaunch.launcher.forward import forward
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.sharding.precision import Precision
from shardlaunch.sharding.world import World


class Evaluator:
    """Evaluate a model on the held-out data."""

    def __init__(self, recipe: Recipe, batches: Batches, *, world: World, precision: Precision) -> None:
        self._recipe = recipe
        self._batches = batches
        self._world = world
        self._precision = precision
        self._metrics = {name: metric.to(world.device) for name, metric in recipe.metrics().items()}

    @property
    def higher_is_better(self) -> bool:
        """Return which way the recipe's best metric goes."""
        metric = self._metrics.get(self._recipe.best_metric)
        return bool(metric.higher_is_better) if metric is not None else False

    @property
    def names(self) -> list[str]:
        """Return the names of what `evaluate` returns."""
        return ["loss", *self._metrics]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, on_progress: Callable[[int, int], None]) -> dict[str, float]:
        """Return the mean loss a target and the recipe's metrics. All ranks.

        `on_progress` is told how many samples are done, of how many.
        """
        model.eval()
        plan = self._batches.plan
        num_done = 0
        for metric in self._metrics.values():
            metric.reset()
        sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for batch in self._batches.steps(0, plan.steps_per_epoch):
            for micro_batch in batch.micro_batches:
                inputs, outputs, loss = forward(self._recipe, model, micro_batch, self._precision)
                if micro_batch.weight:
                    sums[0] += loss
                    sums[1] += micro_batch.num_targets
                    self._recipe.update(self._metrics, outputs, inputs)
            num_done += batch.num_samples
            on_progress(num_done, plan.num_samples)
        model.train()
        loss, num_targets = self._world.sum(sums).tolist()
        results = {"loss": loss / num_targets}
        for name, metric in self._metrics.items():
            results[name] = float(metric.compute())
        return results

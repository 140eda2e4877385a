"""Metrics with the same bits on any number of ranks: a micro-batch is the unit, and their states are summed exactly."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from shardlaunch.errors import UserError
from shardlaunch.sharding.exact import summands
from shardlaunch.sharding.world import World

Key = tuple[int, int]
"""Step and number of a micro-batch."""
_HOW = {"dim_zero_sum": "sum", "dim_zero_cat": "cat", "dim_zero_max": "max", "dim_zero_min": "min"}


class ExactMetrics:
    """Collects the states of metrics after each micro-batch, and sets them to those over all ranks.

    Raises UserError for a metric with a state that ranks cannot join exactly.
    """

    def __init__(self, metrics: Mapping[str, Any], *, world: World) -> None:
        self._metrics = metrics
        self._world = world
        self._totals: dict[tuple[int, str], torch.Tensor] = {}
        self._rows: list[tuple[Key, dict[tuple[int, str], torch.Tensor]]] = []
        for name, metric in metrics.items():
            for nested in with_nested({name: metric}):
                nested.sync_on_compute = False
                nested._to_sync = False
                for state, reduction in nested._reductions.items():
                    if getattr(reduction, "__name__", "") not in _HOW:
                        raise UserError(
                            f"--exact: the state {state!r} of metric {name!r} ({type(nested).__name__}) is joined over "
                            f"ranks in a way of its own; it must be summed, concatenated, or a maximum or minimum"
                        )

    def add(self, key: Key) -> None:
        """Take what the metrics have of the micro-batch that they were just updated with, and reset them."""
        rows: dict[tuple[int, str], torch.Tensor] = {}
        for number, metric in enumerate(with_nested(self._metrics)):
            for state, reduction in metric._reductions.items():
                value, how, place = getattr(metric, state), _HOW[reduction.__name__], (number, state)
                if how == "cat":
                    items = value if isinstance(value, list) else [value]
                    if items:
                        rows[place] = torch.cat([torch.atleast_1d(item) for item in items])
                    continue
                value = summands(value) if how == "sum" and value.is_floating_point() else value
                self._totals[place] = _joined(how, self._totals[place], value) if place in self._totals else value
        self._rows.append((key, rows))
        for metric in self._metrics.values():
            metric.reset()

    def finish(self) -> None:
        """Set the states of all metrics to those over all ranks' micro-batches, in their order. All ranks."""
        ranks = self._gathered((self._rows, self._totals))
        rows = sorted((row for rank_rows, _ in ranks for row in rank_rows), key=lambda row: row[0])
        for number, metric in enumerate(with_nested(self._metrics)):
            for state, reduction in metric._reductions.items():
                how, place = _HOW[reduction.__name__], (number, state)
                if how == "cat":
                    found = [of_batch[place] for _, of_batch in rows if place in of_batch]
                    setattr(metric, state, found)
                    continue
                values = [totals[place] for _, totals in ranks if place in totals]
                if not values:
                    continue
                total = values[0]
                for value in values[1:]:
                    total = _joined(how, total, value)
                default = metric._defaults[state]
                is_split = how == "sum" and default.is_floating_point()
                setattr(metric, state, total.sum(0).to(default.dtype) if is_split else total)
            metric._update_count = max(1, len(rows))
            metric._computed = None

    def _gathered(self, mine: Any) -> list[Any]:
        if self._world.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self._world.size
        dist.all_gather_object(everyone, mine, group=self._world.host_group)
        return everyone


def _joined(how: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one + other if how == "sum" else torch.maximum(one, other) if how == "max" else torch.minimum(one, other)


def with_nested(metrics: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the metrics and those nested in them (as in a sum of metrics)."""
    from torchmetrics import Metric

    for metric in metrics.values():
        yield from (module for module in metric.modules() if isinstance(module, Metric))

"""Metrics with the same bits on any number of ranks: a micro-batch is the unit, and their states are summed exactly."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load, save

from shardlaunch.errors import UserError
from shardlaunch.sharding.exact import summands
from shardlaunch.sharding.world import World

Key = tuple[int, int]
"""Step and number of a micro-batch."""
Place = tuple[int, str]
"""Number of a metric, and its state."""
_HOW = {"dim_zero_sum": "sum", "dim_zero_cat": "cat", "dim_zero_max": "max", "dim_zero_min": "min"}


class ExactMetrics:
    """Collects the states of metrics after each micro-batch, and sets them to those over all ranks.

    Raises UserError for a metric with a state that ranks cannot join exactly.
    """

    def __init__(self, metrics: Mapping[str, Any], *, world: World) -> None:
        self._world = world
        self._metrics = list(with_nested(metrics))
        self._how: dict[Place, str] = {}
        self._totals: dict[Place, torch.Tensor] = {}
        self._rows: dict[tuple[Key, Place], torch.Tensor] = {}
        for number, metric in enumerate(self._metrics):
            metric.sync_on_compute = False
            metric._to_sync = False
            for state, reduction in metric._reductions.items():
                how = _HOW.get(getattr(reduction, "__name__", ""))
                if how is None:
                    names = (n for n, outer in metrics.items() if any(m is metric for m in with_nested({n: outer})))
                    raise UserError(
                        f"--exact: the state {state!r} of metric {next(names)!r} ({type(metric).__name__}) is joined "
                        f"over ranks in a way of its own; it must be summed, concatenated, or a maximum or minimum"
                    )
                self._how[number, state] = how

    def add(self, key: Key) -> None:
        """Take what the metrics have of the micro-batch that they were just updated with, and reset them."""
        for place, how in self._how.items():
            value = getattr(self._metrics[place[0]], place[1])
            if how == "cat":
                items = value if isinstance(value, list) else [value]
                if items:
                    self._rows[key, place] = torch.cat([torch.atleast_1d(item) for item in items])
            else:
                self._add_total(place, summands(value) if how == "sum" and value.is_floating_point() else value)
        for metric in self._metrics:
            metric.reset()

    def finish(self) -> None:
        """Set the states of all metrics to those over all ranks' micro-batches, in their order. All ranks."""
        self._add_other_ranks()
        keys = sorted(self._rows)
        for place, how in self._how.items():
            metric, state = self._metrics[place[0]], place[1]
            if how == "cat":
                setattr(metric, state, [self._rows[key] for key in keys if key[1] == place])
            elif place in self._totals:
                default, total = metric._defaults[state], self._totals[place]
                is_split = how == "sum" and default.is_floating_point()
                setattr(metric, state, total.sum(0).to(default.dtype) if is_split else total)
        for metric in self._metrics:
            metric._update_count = 1
            metric._computed = None

    def _add_total(self, place: Place, value: torch.Tensor) -> None:
        if place in self._totals:
            total, how = self._totals[place], self._how[place]
            value = total + value if how == "sum" else (torch.maximum if how == "max" else torch.minimum)(total, value)
        self._totals[place] = value

    def _add_other_ranks(self) -> None:
        if self._world.size == 1:
            return
        named = {" ".join(map(str, (*key, *place))): rows for (key, place), rows in self._rows.items()}
        named |= {" ".join(map(str, place)): total for place, total in self._totals.items()}
        mine = save({name: tensor.cpu().clone() for name, tensor in named.items()})
        for rank in range(self._world.size):
            found = load(self._world.peers.data_of(rank, mine))
            for name, on_cpu in found.items() if rank != self._world.rank else ():
                tensor = on_cpu.to(self._world.device)
                *key, number, state = name.split()
                if key:
                    self._rows[(int(key[0]), int(key[1])), (int(number), state)] = tensor
                else:
                    self._add_total((int(number), state), tensor)


def with_nested(metrics: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the metrics and those nested in them (as in a sum of metrics)."""
    from torchmetrics import Metric

    for metric in metrics.values():
        yield from (module for module in metric.modules() if isinstance(module, Metric))

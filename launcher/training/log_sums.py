"""Sums of what a recipe logs, over micro-batches and ranks, with the same bits in any order.

They travel with the sums that ranks exchange anyway. Only where a rank logs under a new name do the ranks agree on it,
by further collectives.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardlaunch.launcher.logged import Logged
from shardlaunch.sharding.exact import summands
from shardlaunch.sharding.world import World

UNITS = tuple(2.0**exponent for exponent in (10, -20, -50, -80, -110, -140))
"""Of which sums are multiples: they are exact from 2^-140 to magnitudes of 2^63."""
_NUMBERS = 2 * len(UNITS)  # of a name: the parts of sum and count
_MOST_HELD = 4096


class LogSums:
    """What this rank has logged, and the names that all ranks know."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: list[str] = []  # in an order that all ranks share
        self._held: list[tuple[str, Any, Any]] = []
        self._totals: dict[str, torch.Tensor] = {}
        self._summed = self._totals  # those that the ranks sum: a step may be run again meanwhile

    def begin(self) -> None:
        """Forget what was logged, but for what the ranks are summing."""
        self._held.clear()
        self._totals = {}

    def add(self, logged: Logged) -> None:
        """Take what a micro-batch has logged."""
        for name, pairs in logged.items():
            self._held += [(name, total, count) for total, count in pairs]
        if len(self._held) >= _MOST_HELD:
            self._fold()

    @property
    def num_numbers(self) -> int:
        """How many numbers the ranks exchange. The same on all ranks."""
        return 1 + _NUMBERS * len(self._known)

    def put(self, numbers: torch.Tensor) -> None:
        """Set numbers, which are zeros, to what all ranks are to sum: whether a name is new, and the known sums."""
        self._fold()
        self._summed = self._totals
        if self._totals:
            numbers[0] = float(bool(self._totals.keys() - set(self._known)))
            numbers[1:] = self._of(self._known)

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the values by name, of summed numbers. All ranks: they agree on names that are new to any of them."""
        found = self._known_values(self._known, sums[1:])
        if sums[0]:
            new = self._agree()
            extra = self._of(new)
            found |= self._known_values(new, self._world.sum_of_data(extra).tolist())
        return dict(sorted(found.items()))  # which rank was the first to log a name depends on the number of ranks

    def of_one_rank(self) -> Callable[[], dict[str, float]]:
        """Return a function to get the values by name, of a run on one rank. Does not wait for the device."""
        if not self._held and not self._totals:
            return dict
        numbers = self._zeros(len(self._known), more=1)
        self.put(numbers)
        return lambda: self.values(numbers.tolist())

    def _fold(self) -> None:
        """Add what is held to the totals: a few operations, however much it is."""
        if not self._held:
            return
        names = {name: place for place, name in enumerate(dict.fromkeys(name for name, _, _ in self._held))}
        values = self._stacked([number for _, *pair in self._held for number in pair]).view(-1, 2)
        places = self._on_device(torch.tensor([names[name] for name, _, _ in self._held]))
        sums = values.new_zeros(len(UNITS), len(names), 2).index_add_(1, places, summands(values, UNITS))
        for name, place in names.items():
            mine = sums[:, place]
            self._totals[name] = self._totals[name] + mine if name in self._totals else mine
        self._held.clear()

    def _stacked(self, numbers: Sequence[Any]) -> torch.Tensor:
        """Return numbers as one tensor on the device: float64."""
        on_device = {place: number for place, number in enumerate(numbers) if isinstance(number, torch.Tensor)}
        plain = [0.0 if place in on_device else number for place, number in enumerate(numbers)]
        values = self._on_device(torch.tensor(plain, dtype=torch.float64))
        if on_device:
            stacked = torch.stack([tensor.to(values.device, torch.float64) for tensor in on_device.values()])
            values[self._on_device(torch.tensor(list(on_device)))] = stacked
        return values

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the CPU on the device, without a wait for it."""
        return tensor.to(self._world.device, non_blocking=True)

    def _zeros(self, num_names: int, more: int = 0) -> torch.Tensor:
        return torch.zeros(_NUMBERS * num_names + more, dtype=torch.float64, device=self._world.device)

    def _of(self, names: Sequence[str]) -> torch.Tensor:
        """Return the totals of names, flat, with zeros for those that this rank has not logged."""
        zeros = self._zeros(1).view(len(UNITS), 2)
        return torch.stack([self._summed.get(name, zeros) for name in names]).view(-1) if names else self._zeros(0)

    def _agree(self) -> list[str]:
        """Return the names that some rank has and not all know, in the same order everywhere. All ranks."""
        peers = self._world.peers
        before = len(self._known)
        while True:
            mine = [name for name in self._summed if name not in self._known]
            (first,) = peers.most([-peers.rank if mine else -peers.num_ranks])
            if -first == peers.num_ranks:
                return self._known[before:]
            self._known += json.loads(peers.data_of(-first, json.dumps(mine).encode()))

    def _known_values(self, names: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
        found = {}
        for place, name in enumerate(names):
            of_name = numbers[place * _NUMBERS : (place + 1) * _NUMBERS]
            total, count = math.fsum(of_name[::2]), math.fsum(of_name[1::2])
            if total or count:
                found[name] = total / count if 0 < count < math.inf else math.nan
        return found

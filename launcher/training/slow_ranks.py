"""Time per part of a step on each rank, exchanged every 100 steps with the sums that a step has anyway."""

import statistics
from collections.abc import Mapping, Sequence

from shardlaunch.progress import DATA, PARTS, WAITING, Progress, progress
from shardlaunch.sharding.world import World

EVERY = 100
"""Steps from one report to the next."""
SLOWER = 1.5
"""How much longer than the median rank a slow one takes for something."""
LEAST_SHARE = 0.2
"""What that costs, at least, of a step."""

RankTimes = Mapping[str, Sequence[float]]
"""Seconds per step by part of a step, for each rank."""


class PartTimes:
    """This rank's mean times since the last report, and everyone's.

    They are taken from the clock of the host: on a GPU, which runs behind, the time for its work is found where the
    host waits for a number, in `waiting`.
    """

    def __init__(self, world: World, source: Progress = progress) -> None:
        self._world = world
        self._source = source
        self._step: int | None = None
        self._before = dict(source.seconds)

    def of_all(self, step: int) -> list[float]:
        """Return numbers to sum over the ranks in step `step` (from 0): none unless a report is due. All ranks."""
        if self._step is None:
            self._begin(step)
        if self._world.size == 1 or (step + 1) % EVERY:
            return []
        now = dict(self._source.seconds)
        num_steps = max(1, step - (self._step or 0))
        mine = [(now[part] - self._before[part]) / num_steps for part in PARTS]
        self._begin(step)
        numbers = [0.0] * (len(PARTS) * self._world.size)
        numbers[self._world.rank :: self._world.size] = mine
        return numbers

    def _begin(self, step: int) -> None:
        self._step, self._before = step, dict(self._source.seconds)

    def by_part(self, sums: Sequence[float]) -> RankTimes:
        """Return the summed numbers by part of a step."""
        size = self._world.size
        return {part: sums[number * size : (number + 1) * size] for number, part in enumerate(PARTS)} if sums else {}


def spread(times: RankTimes) -> dict[str, list[float]]:
    """Return minimum, median and maximum over the ranks, under the names that metrics.jsonl has."""
    return {f"ranks_{part}_s": [min(values), statistics.median(values), max(values)] for part, values in times.items()}


def slowest(times: RankTimes, *, is_sharded: bool) -> str:
    """Say which rank is clearly slower than the others; empty if none is.

    Where the ranks wait for each other in the passes, whose parameters are sharded, only the time for data tells.
    """
    if not times:
        return ""
    step_s = sum(statistics.median(values) for values in times.values())
    found = (0.0, "")
    for part, values in times.items():
        if part == WAITING or (is_sharded and part != DATA):
            continue
        rank = max(range(len(values)), key=values.__getitem__)
        usual = statistics.median_low([value for other, value in enumerate(values) if other != rank])
        excess = values[rank] - usual
        if values[rank] > SLOWER * usual and excess > LEAST_SHARE * step_s:
            text = (
                f"rank {rank} is slower than the others: {values[rank]:.3g} s per step for {part}, where the median of "
                f"the others takes {usual:.3g} s"
            )
            found = max(found, (excess, text))
    return found[1]

"""What the ranks sum in a step, in one exchange per update: losses, logged values, counts of the next batch."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple
from zlib import crc32

import torch

from shardlaunch.errors import UserError
from shardlaunch.launcher.training.batches import GlobalBatch
from shardlaunch.launcher.training.forward import Denominators
from shardlaunch.launcher.training.log_sums import LogSums
from shardlaunch.launcher.training.slow_ranks import PartTimes, RankTimes
from shardlaunch.launcher.training.stopping import Asked, Requests
from shardlaunch.sharding.exact import NUM_PARTS
from shardlaunch.sharding.world import World

_NOTHING_ASKED = Asked()


class CountedBatch(NamedTuple):
    """This rank's micro-batches of a global batch (None: the run is over), and what all ranks know of it."""

    batch: GlobalBatch | None
    num_targets: int
    num_tokens: int
    asked: Asked = Asked()
    """What any rank has been asked for, before this batch."""
    times: RankTimes = MappingProxyType({})
    """Times of the ranks until this batch, where a report is due."""
    targets: Mapping[str, int] = MappingProxyType({})
    """The numbers of targets by loss, if the recipe counts them so."""

    @property
    def denominators(self) -> Denominators:
        return Denominators(self.num_targets, self.targets)


class Sums(NamedTuple):
    """What an update sums over the ranks: its loss, the values logged; the first one the next batch's counts too."""

    loss: float
    logged: dict[str, float]
    upcoming: CountedBatch | None = None


class StepSums:
    """The exchanges of a run's steps."""

    def __init__(self, world: World, requests: Requests, part_times: PartTimes, logs: LogSums) -> None:
        self._world = world
        self._requests = requests
        self._part_times = part_times
        self._logs = logs
        self._names: tuple[str, ...] | None = None

    def counted(self, batch: GlobalBatch | None) -> CountedBatch:
        """Return the first batch with its counts over all ranks. All ranks. Raises UserError if names differ."""
        names = tuple(sorted(batch.micro_batches[0].targets)) if batch is not None else ()
        code = crc32(repr(names).encode())
        (first,) = self._world.peers.of_first([code])
        if first != code:
            raise _other_names(names)
        self._names = names
        counts = self._world.sum_of_data(torch.tensor(self._counts(batch), device=self._world.device))
        return self._with_counts(batch, counts.tolist())

    def begin(self, step: int, loss: torch.Tensor | None, following: GlobalBatch | None) -> Callable[[], Sums]:
        """Start to sum this step's loss and what is logged, and the next batch's counts. All ranks.

        Returns a function to get them.
        """
        counts, asked = self._counts(following), self._requests.now()
        if self._world.size == 1:
            assert loss is not None
            logged = self._logs.of_one_rank()
            upcoming = self._with_counts(following, counts, asked)
            return lambda: Sums(sum(loss.reshape(-1).tolist()), logged(), upcoming)
        times = self._part_times.of_all(step)
        finish = self._begin(loss, counts, [*asked, *times])

        def finish_step() -> Sums:
            sums, of_counts, others = finish()
            found = Asked(*(each > 0 for each in others[: len(asked)]))
            by_part = self._part_times.by_part(others[len(asked) :])
            return sums._replace(upcoming=self._with_counts(following, of_counts, found, by_part))

        return finish_step

    def begin_further(self, loss: torch.Tensor | None) -> Callable[[], Sums]:
        """Start to sum the loss of a step's further update, and what it logs. All ranks."""
        if self._world.size == 1:
            assert loss is not None
            logged = self._logs.of_one_rank()
            return lambda: Sums(sum(loss.reshape(-1).tolist()), logged())
        finish = self._begin(loss, [], [])
        return lambda: finish()[0]

    def _begin(
        self, loss: torch.Tensor | None, counts: list[int], others: list[float]
    ) -> Callable[[], tuple[Sums, list[float], list[float]]]:
        """Start to sum over several ranks. Returns a function to get the sums: of the update, `counts` and `others`."""
        logs = slice(first := NUM_PARTS + len(counts), first + self._logs.num_numbers)
        # float64 holds the loss and integers up to 2**53 exactly.
        sums = torch.tensor(
            [*[0.0] * NUM_PARTS, *counts, *[0.0] * self._logs.num_numbers, *others],
            dtype=torch.float64,
            device=self._world.device,
        )
        if self._world.is_counted:
            if loss is not None:
                sums[: loss.numel()] = loss
            self._logs.put(sums[logs])
        else:
            sums[: logs.start] = 0
        work = self._world.begin_sum(sums)

        def finish() -> tuple[Sums, list[float], list[float]]:
            assert work is not None
            work.wait()
            numbers = sums.tolist()
            of_counts = numbers[NUM_PARTS : logs.start]
            return Sums(sum(numbers[:NUM_PARTS]), self._logs.values(numbers[logs])), of_counts, numbers[logs.stop :]

        return finish

    def _counts(self, batch: GlobalBatch | None) -> list[int]:
        """Return this rank's numbers of targets and of tokens, and of targets by loss."""
        micro_batches = batch.micro_batches if batch is not None else []
        names = self._names or ()
        for each in micro_batches:
            if len(each.targets) != len(names) or any(name not in each.targets for name in names):
                raise _other_names(names)
        return [
            sum(m.weight * m.num_targets for m in micro_batches),
            sum(m.weight * m.num_tokens for m in micro_batches),
            *(sum(m.weight * m.targets[name] for m in micro_batches) for name in names),
        ]

    def _with_counts(
        self,
        batch: GlobalBatch | None,
        counts: list[int] | list[float],
        asked: Asked = _NOTHING_ASKED,
        times: RankTimes = MappingProxyType({}),
    ) -> CountedBatch:
        num_targets, num_tokens, *by_name = map(int, counts)
        targets = dict(zip(self._names or (), by_name, strict=True))
        return CountedBatch(batch, num_targets, num_tokens, asked, times, targets)


def _other_names(names: tuple[str, ...]) -> UserError:
    expected = f"numbers by name ({', '.join(names)})" if names else "one number"
    return UserError(
        f"the recipe's num_targets() must return the same names for each batch, with 0 where a batch has none; it "
        f"returned {expected} for a batch and something else for another"
    )

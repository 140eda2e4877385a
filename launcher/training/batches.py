"""Global batches in the order of a plan, divided into micro-batches that are spread over ranks.

No rank or loader keeps a position: the run's position is the step t, the number of global batches consumed.
"""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.seeding import sample_seeds, seed_generators
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.launcher.training.batch_plan import BatchPlan
from shardlaunch.launcher.training.clock import Clock
from shardlaunch.launcher.training.equal_work import shares
from shardlaunch.launcher.training.fetching import EVALUATION, fetched
from shardlaunch.launcher.training.stopping import SIGNALS
from shardlaunch.progress import COUNT, PID, SAMPLE, STEP, progress

_OF_COLLATE = 0x2545F4914F6CDD1D


class Slot(NamedTuple):
    """One micro-batch for a rank to run. Weight 0 marks a repetition that only keeps the ranks in step.

    The seeds of its samples follow from `keys`, or from their numbers where there are none.
    """

    step: int
    epoch: int
    micro_batch: int
    weight: int
    samples: np.ndarray
    keys: np.ndarray | None = None


def slots_of_rank(plan: BatchPlan, step: int, *, rank: int, num_ranks: int) -> Iterator[Slot]:
    """Yield the slots of one rank: micro-batches with its share of the work, equally many slots on every rank.

    A rank with fewer micro-batches begins with the first one of the step, of weight 0, so that all take part in the
    same collectives: before its own, because some data can only be read in order.
    """
    epoch, _, _ = plan.batch(step)
    bounds = plan.bounds(step)
    num_micro_batches = len(bounds) - 1
    mine = shares(plan.work(step), num_ranks)[rank] if num_ranks > 1 else range(num_micro_batches)
    num_spare = -(-num_micro_batches // num_ranks) - len(mine)
    for weight, j in [*[(0, 0)] * num_spare, *((1, each) for each in mine)]:
        samples = plan.between(epoch, bounds[j], bounds[j + 1])
        keys = plan.keys(bounds[j], samples)
        yield Slot(step=step, epoch=epoch, micro_batch=j, weight=weight, samples=samples, keys=keys)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A collated micro-batch, with the counts that are known at collation."""

    index: int
    weight: int
    inputs: Any
    num_targets: int
    num_tokens: int
    targets: Mapping[str, int] = field(default_factory=dict)
    """The numbers of targets by loss, if the recipe counts them so; their sum is `num_targets`."""


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The micro-batches of one step that this rank runs."""

    step: int
    num_samples: int
    num_micro_batches: int
    micro_batches: list[MicroBatch]


class Batches:
    """Load the micro-batches of one rank in the plan's order.

    `collate(samples, seeds)` builds a batch from the data set's samples. The seeds, one per sample and derived from
    (seed, epoch, sample), are None when not `training`. The global generators are seeded from them too. `clock` sets
    the moment of the step that a batch is collated for; without one, the moment is that of the caller.
    """

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        *,
        collate: Callable[[Any, np.ndarray | None], Any],
        num_targets: Callable[[Any], int | Mapping[str, int]],
        num_tokens: Callable[[Any], int],
        rank: int,
        num_ranks: int,
        training: bool,
        num_workers: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.plan = plan
        self._dataset = dataset
        self._collate = collate
        # Tensors that are indexed, by no code of the user: seeding generators would be most of the work.
        self._is_plain = isinstance(dataset, TensorData) and getattr(collate, "__func__", None) is Recipe.collate
        self._num_targets = num_targets
        self._num_tokens = num_tokens
        self._rank = rank
        self._num_ranks = num_ranks
        self._training = training
        self._num_workers = num_workers
        self._notes: Any = ()  # what each worker loads
        self._clock = clock

    def steps(self, first: int, end: int) -> Iterator[GlobalBatch]:
        """Yield the batches of steps [first, end)."""
        micro_batches = self._load_all(lambda: self._slots(first, end))
        for step in range(first, end):
            _, begin, last = self.plan.batch(step)
            num_micro_batches = -(-(last - begin) // self.plan.micro_batch_size)
            num_slots = -(-num_micro_batches // self._num_ranks)
            progress.workers = self._notes
            yield GlobalBatch(
                step=step,
                num_samples=last - begin,
                num_micro_batches=num_micro_batches,
                micro_batches=[next(micro_batches) for _ in range(num_slots)],
            )

    def _slots(self, first: int, end: int) -> Iterator[Slot]:
        for step in range(first, end):
            yield from slots_of_rank(self.plan, step, rank=self._rank, num_ranks=self._num_ranks)

    def _load_all(self, slots: Callable[[], Iterator[Slot]]) -> Iterator[MicroBatch]:
        if not self._num_workers:
            return map(self.load, slots())
        notes = torch.zeros(self._num_workers, len(progress.loading), dtype=torch.int64).share_memory_()
        self._notes = notes.numpy()
        loader: DataLoader[MicroBatch | UserError] = DataLoader(
            _Loadable(self.load),  # type: ignore[arg-type]
            sampler=_Sampler(slots),
            batch_size=None,
            num_workers=self._num_workers,
            worker_init_fn=partial(_begin_worker, notes),
            generator=torch.Generator(),  # its own, so that it does not draw from the model's stream
        )
        # Garbage of this process, such as the process group of an earlier run, is not to be collected by those that are
        # forked here: gloo's destructor would wait there for threads that only this process has.
        gc.freeze()
        try:
            return map(_raised, loader)  # forks
        finally:
            gc.unfreeze()

    def load(self, slot: Slot) -> MicroBatch:
        """Fetch and collate one micro-batch."""
        if self._clock is not None:
            self._clock.set(slot.step)
        loading = progress.loading
        loading[STEP], loading[SAMPLE], loading[COUNT] = slot.step + 1, int(slot.samples[0]), len(slot.samples)
        keys = slot.samples if slot.keys is None else slot.keys
        seeds = sample_seeds(self.plan.seed, slot.epoch if self._training else EVALUATION, keys)
        rows = fetched(self._dataset, slot.samples, seeds)
        loading[COUNT] = 0
        if not self._is_plain:
            # For a collate() that draws from the global generators; not the first row's seed, to draw other numbers.
            seed_generators(int(seeds[0]) ^ _OF_COLLATE)
        inputs = self._collate(rows, seeds if self._training else None)
        counted = self._num_targets(inputs)
        targets = {name: int(number) for name, number in counted.items()} if isinstance(counted, Mapping) else {}
        micro_batch = MicroBatch(
            index=slot.micro_batch,
            weight=slot.weight,
            inputs=inputs,
            num_targets=sum(targets.values()) if isinstance(counted, Mapping) else int(counted),
            num_tokens=int(self._num_tokens(inputs)),
            targets=targets,
        )
        loading[STEP] = 0
        progress.advance()
        return micro_batch


@dataclass(frozen=True)
class _Loadable:
    """A loading function as a map-style data set whose keys are slots."""

    load: Callable[[Slot], MicroBatch]

    def __getitem__(self, slot: Slot) -> MicroBatch | UserError:
        try:
            return self.load(slot)
        except UserError as error:  # returned: if raised, it would arrive with the worker's traceback as its message
            return error


def _raised(loaded: MicroBatch | UserError) -> MicroBatch:
    progress.advance()
    if isinstance(loaded, UserError):
        raise loaded
    return loaded


@dataclass(frozen=True)
class _Sampler:
    slots: Callable[[], Iterator[Slot]]

    def __iter__(self) -> Iterator[Slot]:
        return self.slots()


def _begin_worker(notes: torch.Tensor, worker: int) -> None:
    """Leave signals to the rank: if its workers died first, it could not save. Note for it what is loaded here."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    progress.loading = notes.numpy()[worker]
    progress.loading[PID] = os.getpid()

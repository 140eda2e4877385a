"""Global batches as a function of (data, seed, epoch), divided into micro-batches that are spread over ranks.

No rank or loader keeps a position: the run's position is the step t, the number of global batches consumed.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader

from shardlaunch.errors import UserError
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.seeding import derive_seed, sample_seeds, seed_generators
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.launcher.training.clock import Clock
from shardlaunch.launcher.training.fetching import EVALUATION, fetched
from shardlaunch.launcher.training.stopping import SIGNALS
from shardlaunch.progress import COUNT, PID, SAMPLE, STEP, progress

# Samples are bucketed by length within this many global batches: enough to match lengths, few enough to stay shuffled.
MEGA_BATCHES = 50
_OF_COLLATE = 0x2545F4914F6CDD1D


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """The order of samples in each epoch and the micro-batches of each step.

    `lengths` has one number per sample (int array) by which samples are bucketed, or is None. Memory: one integer per
    sample and epoch, no Python objects.
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    lengths: np.ndarray | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the epoch's samples: a permutation, int64.

        The samples are shuffled. Each block of 50 global batches is sorted by length and divided into micro-batches;
        these are shuffled within their block and grouped into global batches; those are shuffled over the epoch.
        Within a global batch the micro-batches are in ascending length, so that ranks process similar lengths at the
        same time. The remaining samples form the last, smaller batch.
        """
        rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        order = rng.permutation(self.num_samples)
        if self.lengths is None:
            return order
        size, micro = self.global_batch_size, self.micro_batch_size
        num_full = self.num_samples - self.num_samples % size
        full, rest = order[:num_full], order[num_full:]
        mega = np.arange(num_full) // (MEGA_BATCHES * size)
        full = full[np.lexsort((self.lengths[full], mega))].reshape(-1, micro)
        shuffled = np.lexsort((rng.random(len(full)), mega[::micro]))
        full = full[shuffled].reshape(-1, size // micro, micro)
        by_length = np.argsort(self.lengths[full].max(axis=2), axis=1, kind="stable")
        full = np.take_along_axis(full, by_length[:, :, None], axis=1)
        full = full[rng.permutation(len(full))]
        return np.concatenate((full.reshape(-1), rest[np.argsort(self.lengths[rest], kind="stable")]))

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """Return the samples of each of the step's micro-batches: M of them, fewer in the last batch of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch_size
        batch = _cached_order(self, epoch)[first : first + self.global_batch_size]
        return [batch[i : i + self.micro_batch_size] for i in range(0, len(batch), self.micro_batch_size)]

    def digest(self) -> str:
        """Return a digest of the plan: its sizes, and the first epoch's order as the installed numpy produces it."""
        digest = xxhash.xxh3_128(repr((self.num_samples, self.global_batch_size, self.micro_batch_size)).encode())
        digest.update(self.order(0).tobytes())
        return digest.hexdigest()


@lru_cache(maxsize=3)  # the ending epoch, the beginning epoch, the evaluation
def _cached_order(plan: BatchPlan, epoch: int) -> np.ndarray:
    return plan.order(epoch)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One micro-batch for a rank to run. Weight 0 marks a repetition that only keeps the ranks in step."""

    step: int
    epoch: int
    micro_batch: int
    weight: int
    samples: np.ndarray


def slots_of_rank(
    micro_batches: list[np.ndarray], *, step: int, epoch: int, rank: int, num_ranks: int
) -> Iterator[Slot]:
    """Yield the slots of one rank: micro-batches j = i * num_ranks + rank, equally many slots on every rank.

    Past the last micro-batch, ranks repeat the first one with weight 0, so that all take part in the same collectives.
    """
    for first in range(0, len(micro_batches), num_ranks):
        j = first + rank
        weight = int(j < len(micro_batches))
        j *= weight
        yield Slot(step=step, epoch=epoch, micro_batch=j, weight=weight, samples=micro_batches[j])


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A collated micro-batch, with the counts that are known at collation."""

    index: int
    weight: int
    inputs: Any
    num_targets: int
    num_tokens: int


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
        num_targets: Callable[[Any], int],
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
            samples = self.plan.micro_batches(step)
            num_slots = -(-len(samples) // self._num_ranks)
            progress.workers = self._notes
            yield GlobalBatch(
                step=step,
                num_samples=sum(map(len, samples)),
                num_micro_batches=len(samples),
                micro_batches=[next(micro_batches) for _ in range(num_slots)],
            )

    def _slots(self, first: int, end: int) -> Iterator[Slot]:
        for step in range(first, end):
            yield from slots_of_rank(
                self.plan.micro_batches(step),
                step=step,
                epoch=step // self.plan.steps_per_epoch,
                rank=self._rank,
                num_ranks=self._num_ranks,
            )

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
        return map(_raised, loader)

    def load(self, slot: Slot) -> MicroBatch:
        """Fetch and collate one micro-batch."""
        if self._clock is not None:
            self._clock.set(slot.step)
        loading = progress.loading
        loading[STEP], loading[SAMPLE], loading[COUNT] = slot.step + 1, int(slot.samples[0]), len(slot.samples)
        seeds = sample_seeds(self.plan.seed, slot.epoch if self._training else EVALUATION, slot.samples)
        rows = fetched(self._dataset, slot.samples, seeds)
        loading[COUNT] = 0
        if not self._is_plain:
            # For a collate() that draws from the global generators; not the first row's seed, to draw other numbers.
            seed_generators(int(seeds[0]) ^ _OF_COLLATE)
        inputs = self._collate(rows, seeds if self._training else None)
        micro_batch = MicroBatch(
            index=slot.micro_batch,
            weight=slot.weight,
            inputs=inputs,
            num_targets=int(self._num_targets(inputs)),
            num_tokens=int(self._num_tokens(inputs)),
        )
        loading[STEP] = 0
        progress.advance()
        return micro_batch


class EvaluationPlan(BatchPlan):
    """A plan with a fixed order, by ascending length: every sample once, the same micro-batches on any topology."""

    def order(self, epoch: int) -> np.ndarray:
        """Return the samples, shortest first."""
        if self.lengths is None:
            return np.arange(self.num_samples)
        return np.argsort(self.lengths, kind="stable")


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

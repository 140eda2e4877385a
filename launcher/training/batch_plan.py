"""Which samples are in a micro-batch: a function of (data, seed, epoch), computed for a few batches at a time."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import xxhash

from shardlaunch.launcher.seeding import derive_seed, sample_seeds
from shardlaunch.launcher.training.equal_work import composed, cuts, shares, work_of
from shardlaunch.launcher.training.permutation import Permutation

# Samples are bucketed by length within this many global batches: enough to match lengths, few enough to stay shuffled.
BUCKET_BATCHES = 50
# Fewer where global batches are large: these samples are sorted at once.
BUCKET_SAMPLES = 1 << 17
# The order is computed for so many samples at once: for fewer, calls of numpy take as long as the numbers.
BLOCK_SAMPLES = 1 << 13
EVALUATION_SAMPLES = 1 << 20
# Part of the identity of a run: change it with the order, and keep the order of runs that have begun (former_order.py).
VERSION = 2


@dataclass(kw_only=True, eq=False)
class BatchPlan:
    """The order of samples in each epoch and the micro-batches of each step.

    `lengths` has one number per sample (array, also one that is mapped from a file) by which samples are bucketed, or
    is None. Memory: one block of the order, for any number of samples.

    The samples are shuffled. With lengths, each 50 global batches are sorted by length and divided into micro-batches;
    these are shuffled among themselves and grouped into global batches. Within a global batch the micro-batches are in
    ascending length. The remaining samples of an epoch form the last, smaller batch.

    With `equal_work` a global batch has short and long samples, and as many micro-batches as it would have without,
    but more of the short samples in one than of the long ones.
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    lengths: np.ndarray | None = None
    equal_work: bool = False
    _shuffle: tuple[int, Permutation] | None = field(default=None, init=False, repr=False)
    _held: tuple[int, int, int, np.ndarray] = field(default=(-1, 0, 0, np.empty(0, np.int64)), init=False, repr=False)

    @cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def batch(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step's global batch, and its first position and its end in the order of the epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch_size
        return epoch, first, min(first + self.global_batch_size, self.num_samples)

    def samples_until(self, step: int) -> int:
        """Return the number of samples in the global batches before a step."""
        if not step:
            return 0
        epoch, _, end = self.batch(step - 1)
        return epoch * self.num_samples + end

    def bounds(self, step: int) -> list[int]:
        """Return the positions at which the micro-batches of a step begin, and the end of the last one."""
        epoch, begin, end = self.batch(step)
        bounds = [*range(begin, end, self.micro_batch_size), end]
        if not self.equal_work or self.lengths is None:
            return bounds
        lengths = self.lengths[self.between(epoch, begin, end)]
        return [begin + cut for cut in cuts(lengths, len(bounds) - 1)]

    def work(self, step: int) -> list[float]:
        """Return the work of each micro-batch of a step, that of padding too, by its lengths: in any unit."""
        bounds = self.bounds(step)
        if self.lengths is None:
            return [end - begin for begin, end in pairwise(bounds)]
        epoch, begin, end = self.batch(step)
        longest = self.between(epoch, begin, end)[np.array(bounds[1:]) - begin - 1]
        found: list[float] = (np.diff(bounds) * work_of(self.lengths[longest])).tolist()
        return found

    def waiting(self, num_ranks: int) -> float:
        """Return the part of a step for which ranks wait for the one with the most work, by the first steps."""
        whole = slowest = 0.0
        for step in range(min(self.steps_per_epoch, BUCKET_BATCHES)):
            work = self.work(step)
            whole += sum(work)
            slowest += max(sum(work[index] for index in of_rank) for of_rank in shares(work, num_ranks))
        return 1 - whole / num_ranks / slowest

    def micro_batch(self, epoch: int, first: int) -> np.ndarray:
        """Return the samples of a micro-batch of the usual size that begins at a position; fewer at the epoch's end."""
        return self.between(epoch, first, min(first + self.micro_batch_size, self.num_samples))

    def between(self, epoch: int, first: int, end: int) -> np.ndarray:
        """Return the samples of a global batch, or of a part of it: int64."""
        held, start, stop, order = self._held
        if epoch != held or not start <= first < stop:
            start, stop = self.block(first)
            order = self.order(epoch, start, stop)
            self._held = epoch, start, stop, order
        return order[first - start : end - start]

    def block(self, position: int) -> tuple[int, int]:
        """Return the range of positions that are ordered together with this one; no micro-batch is in two."""
        if self.lengths is None:
            return _multiple(position, self.micro_batch_size, BLOCK_SAMPLES, self.num_samples)
        num_full = self.num_samples - self.num_samples % self.global_batch_size
        num_in_buckets = num_full - num_full % self._bucket_size
        if position < num_in_buckets:
            return _multiple(position, self._bucket_size, BLOCK_SAMPLES, num_in_buckets)
        return (num_in_buckets, num_full) if position < num_full else (num_full, self.num_samples)

    @cached_property
    def _bucket_size(self) -> int:
        return self.global_batch_size * min(BUCKET_BATCHES, max(1, BUCKET_SAMPLES // self.global_batch_size))

    def order(self, epoch: int, start: int, end: int) -> np.ndarray:
        """Return the samples of an epoch at the positions of a block: int64."""
        samples = self.samples_at(epoch, start, end)
        if self.lengths is None:
            return samples
        size, micro = self.global_batch_size, self.micro_batch_size
        if end - start < size:  # the last batch of the epoch
            return samples[np.argsort(self.lengths[samples], kind="stable")]
        buckets = samples.reshape(-1, min(self._bucket_size, end - start))
        buckets = np.take_along_axis(buckets, np.argsort(self.lengths[buckets], axis=1, kind="stable"), axis=1)
        if self.equal_work:
            return self._of_equal_work(epoch, start, buckets)
        numbers = np.arange(start // micro, end // micro)
        keys = sample_seeds(derive_seed(self.seed, "micro-batches"), epoch, numbers).reshape(len(buckets), -1)
        micro_batches = buckets.reshape(*keys.shape, micro)
        shuffled = np.take_along_axis(micro_batches, np.argsort(keys, axis=1, kind="stable")[:, :, None], axis=1)
        batches = shuffled.reshape(-1, size // micro, micro)
        by_length = np.argsort(self.lengths[batches[:, :, -1]], axis=1, kind="stable")
        return np.take_along_axis(batches, by_length[:, :, None], axis=1).reshape(-1)

    def _of_equal_work(self, epoch: int, start: int, buckets: np.ndarray) -> np.ndarray:
        """Return the order of buckets that begin at a position, in each of which samples are in ascending length."""
        assert self.lengths is not None
        size = self.global_batch_size
        places = composed(self.lengths[buckets], size, size // self.micro_batch_size)
        batches = np.take_along_axis(buckets, places.reshape(buckets.shape), axis=1).reshape(places.shape)
        numbers = start // size + np.arange(buckets.size // size)
        keys = sample_seeds(derive_seed(self.seed, "batches"), epoch, numbers).reshape(len(buckets), -1)
        return np.take_along_axis(batches, np.argsort(keys, axis=1, kind="stable")[:, :, None], axis=1).reshape(-1)

    def samples_at(self, epoch: int, start: int, end: int) -> np.ndarray:
        """Return samples as they are shuffled, before lengths are looked at."""
        if self._shuffle is None or self._shuffle[0] != epoch:
            self._shuffle = epoch, Permutation(self.num_samples, derive_seed(self.seed, "order", epoch))
        return self._shuffle[1](np.arange(start, end))

    def keys(self, first: int, samples: np.ndarray) -> np.ndarray:
        """Return what the seeds of the samples of a micro-batch, which begins at a position, follow from."""
        return samples

    def digest(self) -> str:
        """Return a digest of what the order follows from: the version of its rule, numbers, and lengths."""
        numbers = (VERSION, self.num_samples, self.global_batch_size, self.micro_batch_size, self.seed)
        digest = xxhash.xxh3_128(repr(numbers).encode())
        if self.lengths is not None:
            for first in range(0, len(self.lengths), BUCKET_SAMPLES):  # in parts, whatever their dtype
                digest.update(np.ascontiguousarray(self.lengths[first : first + BUCKET_SAMPLES], dtype="<f8").data)
        return digest.hexdigest() + (", equal work" if self.equal_work else "")


class EvaluationPlan(BatchPlan):
    """A plan with a fixed order, by ascending length: every sample once, the same micro-batches on any topology."""

    def block(self, position: int) -> tuple[int, int]:
        """Return the global batches of a million samples: more are not sorted at once."""
        return _multiple(position, self.global_batch_size, EVALUATION_SAMPLES, self.num_samples)

    def order(self, epoch: int, start: int, end: int) -> np.ndarray:
        """Return the samples of a block, shortest first."""
        if self.lengths is None:
            return np.arange(start, end)
        return start + np.argsort(self.lengths[start:end], kind="stable")


def _multiple(position: int, size: int, most: int, num_positions: int) -> tuple[int, int]:
    """Return the range with a position, among ranges of as many `size` positions as `most` has, but one at least."""
    step = size * max(1, most // size)
    start = position - position % step
    return start, min(start + step, num_positions)

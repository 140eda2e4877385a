"""The order of batches in runs that began before its rule had a version: whole epochs in memory."""

import numpy as np
import xxhash

from shardlaunch.launcher.seeding import derive_seed
from shardlaunch.launcher.training.batch_plan import BUCKET_BATCHES, BatchPlan


class FormerPlan(BatchPlan):
    """A plan with one permutation of numpy for each epoch, whose global batches are shuffled over all of it."""

    def block(self, position: int) -> tuple[int, int]:
        """Return the whole epoch."""
        return 0, self.num_samples

    def order(self, epoch: int, start: int, end: int) -> np.ndarray:
        """Return the order of an epoch: int64."""
        rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        order = rng.permutation(self.num_samples)
        if self.lengths is None:
            return order
        size, micro = self.global_batch_size, self.micro_batch_size
        num_full = self.num_samples - self.num_samples % size
        full, rest = order[:num_full], order[num_full:]
        block = np.arange(num_full) // (BUCKET_BATCHES * size)
        full = full[np.lexsort((self.lengths[full], block))].reshape(-1, micro)
        shuffled = np.lexsort((rng.random(len(full)), block[::micro]))
        full = full[shuffled].reshape(-1, size // micro, micro)
        by_length = np.argsort(self.lengths[full].max(axis=2), axis=1, kind="stable")
        full = np.take_along_axis(full, by_length[:, :, None], axis=1)
        full = full[rng.permutation(len(full))]
        return np.concatenate((full.reshape(-1), rest[np.argsort(self.lengths[rest], kind="stable")]))

    def digest(self) -> str:
        """Return a digest of the plan: its sizes, and the first epoch's order as the installed numpy produces it."""
        digest = xxhash.xxh3_128(repr((self.num_samples, self.global_batch_size, self.micro_batch_size)).encode())
        digest.update(self.order(0, 0, self.num_samples).tobytes())
        return digest.hexdigest()

"""A plan whose samples come in an order that the recipe or the options have chosen."""

from dataclasses import dataclass

import numpy as np
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.order import Order
from shardlaunch.launcher.seeding import derive_seed, seeded
from shardlaunch.launcher.training.batch_plan import BLOCK_SAMPLES, BatchPlan
from shardlaunch.launcher.training.orders import digest_of


@dataclass(kw_only=True, eq=False)
class OrderedPlan(BatchPlan):
    """A plan with a chosen order, whose epochs have `num_samples` of the `num_in_data` samples of the data."""

    chosen: Order
    num_in_data: int

    def samples_at(self, epoch: int, start: int, end: int) -> np.ndarray:
        """Return the samples at positions of the chosen order. Raises UserError for what are none of the data."""
        with seeded(derive_seed(self.seed, "order", epoch)):
            found = np.asarray(self.chosen.samples(self.seed, epoch, np.arange(start, end)))
        if found.shape != (end - start,) or found.dtype.kind not in "iu":
            raise UserError(
                f"the recipe's order: samples() must return one whole number per position; for {end - start} positions "
                f"it returned {found.dtype} of shape {list(found.shape)}"
            )
        outside = np.flatnonzero((found < 0) | (found >= self.num_in_data))
        if len(outside):
            raise UserError(
                f"the recipe's order: position {start + outside[0]} of epoch {epoch} has sample {found[outside[0]]}, "
                f"but the training data has samples 0 to {self.num_in_data - 1}"
            )
        return found.astype(np.int64)

    def check(self) -> None:
        """Raise UserError for an order that has no samples, or that is no function of seed and epoch."""
        end = min(self.num_samples, BLOCK_SAMPLES)
        first, _, again = (self.samples_at(epoch, 0, end) for epoch in (0, 1, 0))
        if not np.array_equal(first, again):
            at = int(np.flatnonzero(first != again)[0])
            raise UserError(
                f"the recipe's order is no function of seed and epoch: asked again, position {at} of epoch 0 has "
                f"sample {again[at]}, which was {first[at]}. Draw with np.random.default_rng((seed, epoch)) in "
                f"samples(), not from a generator that is kept"
            )

    def keys(self, first: int, samples: np.ndarray) -> np.ndarray:
        """Return positions: a sample that comes several times in an epoch is another each time."""
        return np.arange(first, first + len(samples))

    def digest(self) -> str:
        """Return a digest of what the order follows from, with its name."""
        with seeded(derive_seed(self.seed, "order")):
            chosen = digest_of(self.chosen, self.seed)
        digest = xxhash.xxh3_128(f"{super().digest()} {self.num_in_data} {chosen}".encode())
        return f"{chosen.partition(' ')[0]} {digest.hexdigest()}"

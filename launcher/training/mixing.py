"""The order of several sources that are mixed by weights: which sample comes when follows from the position alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import lcm

import numpy as np
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.order import Order
from shardlaunch.launcher.seeding import derive_seed
from shardlaunch.launcher.training.orders import digest_of
from shardlaunch.launcher.training.permutation import Permutation

LONGEST_PATTERN = 10_000
_VERSION = 1  # change it with the samples of the order


@dataclass(frozen=True, eq=False)
class Pattern:
    """A sequence of sources that repeats: `sources` by place, and `before`, of each source, how many stand before it.

    `before` has one row per source and one column more than there are places: the last is the source's count.
    """

    sources: np.ndarray
    before: np.ndarray


def pattern_of(weights: Sequence[Fraction | float | str]) -> Pattern:
    """Return the shortest pattern with sources in proportion to their weights, spread evenly.

    At any place, each source has come as often as its weight says, but for about one. Weights whose pattern would be
    longer than 10,000 are rounded to ten-thousandths of their sum. Raises UserError for weights that are negative, or
    rounded to 0.
    """
    try:
        exact = [Fraction(str(weight)) for weight in weights]
    except ValueError:
        exact = []
    if not exact or min(exact) < 0 or not sum(exact):
        raise UserError(f"weights of sources must be numbers from 0, not all 0: {', '.join(map(str, weights))}")
    shares = [weight / sum(exact) for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length > LONGEST_PATTERN:
        length = LONGEST_PATTERN
    counts = [int(share * length) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: counts[source] - shares[source] * length)
    for source in by_remainder[: length - sum(counts)]:
        counts[source] += 1
    for weight, share, count in zip(weights, shares, counts, strict=True):
        if share and not count:
            raise UserError(f"a weight of {weight} is less than a ten-thousandth of the sum of all; give a larger one")
    # By Webster: the i-th of n stands at (2 i + 1) / n, the same quotient for the same fraction.
    places = np.concatenate([(2 * np.arange(count) + 1) / max(1, count) for count in counts])
    sources = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
    chosen = sources == np.arange(len(counts))[:, None]
    return Pattern(sources, np.pad(np.cumsum(chosen, axis=1), ((0, 0), (1, 0))))


class Shuffled:
    """The order of a source that may be read anywhere: all of it, shuffled anew each time."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of an epoch."""
        return Permutation(self.num_samples, derive_seed(seed, "order", epoch))(positions)

    def digest(self) -> str:
        """Return what the order follows from."""
        return f"shuffled {self.num_samples}"


@dataclass(frozen=True)
class Stage:
    """The weights of the sources from a sample of the run on."""

    first_sample: int
    weights: tuple[str, ...]


class MixedOrder:
    """An order of sources that stand one behind the other in the data, mixed by weights that may change.

    Of the samples that the run has consumed, the pattern of the weights says which are of which source; a source's own
    samples come in its own order, which begins anew, shuffled otherwise, when it has come to its end. An epoch has as
    many samples as all sources have.
    """

    name = "mixed"

    def __init__(self, sources: Sequence[Order], stages: Sequence[Stage]) -> None:
        self.sources = sources
        self.stages = stages
        sizes = [source.num_samples for source in sources]
        self.num_samples = self.num_in_data = sum(sizes)
        # Sorted by length, samples would come up to 50 global batches before a step that changes the weights.
        self.fixes_batches = len(stages) > 1
        self._offsets = np.cumsum([0, *sizes])
        self._patterns = [pattern_of(stage.weights) for stage in stages]
        # How often each source has come before each stage.
        self._before = [np.zeros(len(sizes), dtype=np.int64)]
        for number, (stage, following) in enumerate(pairwise(stages)):
            length = np.array([following.first_sample - stage.first_sample])
            counts = [self._counts(number, source, length)[0] for source in range(len(sizes))]
            self._before.append(np.array(counts))

    def _counts(self, stage: int, source: int, places: np.ndarray) -> np.ndarray:
        """Return how often a source has come before some places of a stage, in the run."""
        pattern = self._patterns[stage]
        rounds, inner = np.divmod(places, len(pattern.sources))
        counts: np.ndarray = self._before[stage][source] + rounds * pattern.before[source, -1]
        counts += pattern.before[source, inner]
        return counts

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of an epoch: int64."""
        consumed = epoch * self.num_samples + positions
        starts = [stage.first_sample for stage in self.stages]
        stages = np.searchsorted(starts, consumed, side="right") - 1
        found = np.empty(len(positions), dtype=np.int64)
        for stage in np.unique(stages).tolist():
            in_stage = np.flatnonzero(stages == stage)
            places = consumed[in_stage] - starts[stage]
            pattern = self._patterns[stage].sources
            of_place = pattern[places % len(pattern)]
            for source in np.unique(of_place).tolist():
                here = of_place == source
                counts = self._counts(stage, source, places[here])
                found[in_stage[here]] = self._offsets[source] + self._of_source(seed, source, counts)
        return found

    def _of_source(self, seed: int, number: int, counts: np.ndarray) -> np.ndarray:
        """Return the samples that a source has when it comes for the first, second ... time in the run, from 0."""
        source = self.sources[number]
        passes, places = np.divmod(counts, source.num_samples)
        found = np.empty(len(counts), dtype=np.int64)
        for one in np.unique(passes).tolist():
            here = passes == one
            found[here] = source.samples(derive_seed(seed, "source", number), one, places[here])
        return found

    def passes_per_epoch(self, stage: int) -> list[float]:
        """Return how often each source is gone through in an epoch."""
        pattern = self._patterns[stage]
        sizes = np.array([source.num_samples for source in self.sources])
        passes: list[float] = (pattern.before[:, -1] / len(pattern.sources) * self.num_samples / sizes).tolist()
        return passes

    def digest(self) -> str:
        """Return what the order follows from."""
        parts = [digest_of(source, 0) for source in self.sources]
        patterns = [pattern.sources.tobytes() for pattern in self._patterns]
        digest = xxhash.xxh3_64(repr((_VERSION, [stage.first_sample for stage in self.stages], parts)).encode())
        for pattern in patterns:
            digest.update(pattern)
        return f"{self.name} {digest.hexdigest()}"

"""Orders of training samples: weighted, balanced, some classes per batch, repeated, from easy to hard, or your own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.order import Order
from shardlaunch.launcher.seeding import derive_seed, sample_seeds
from shardlaunch.launcher.training.permutation import Permutation

_VERSION = 1  # change it with the samples of an order
_BITS = 53  # of a draw: what float64 holds exactly
_DIGESTED_AT_ONCE = 1 << 16
_MOST_DIGESTED = 1 << 22

__all__ = ["balanced", "curriculum", "own", "per_class", "repeated", "sequential", "weighted"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Order:
    """An order that follows from an array, of one number per sample of the data, and settings."""

    name: str
    num_samples: int
    num_in_data: int
    array: np.ndarray
    settings: tuple[Any, ...] = ()
    fixes_batches: bool = False
    group_size: int = 1
    draw: Callable[[int, int, np.ndarray], np.ndarray] = field(repr=False)

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of an epoch."""
        return self.draw(seed, epoch, positions)

    def digest(self) -> str:
        """Return what the order follows from."""
        numbers = (_VERSION, self.num_samples, self.num_in_data, *self.settings)
        digest = xxhash.xxh3_64(repr(numbers).encode())
        digest.update(np.ascontiguousarray(self.array).data)
        return f"{self.name} {digest.hexdigest()}"


def sequential(num_samples: int) -> Order:
    """Return the order of the data itself, in each epoch."""
    count = _count("sequential", num_samples)
    return _Order(
        name="sequential",
        num_samples=count,
        num_in_data=count,
        array=np.empty(0),
        fixes_batches=True,
        draw=lambda seed, epoch, positions: positions,
    )


def weighted(weights: Any, *, num_samples: int | None = None) -> Order:
    """Return an order that draws each sample with a probability, with replacement.

    `weights` has one number from 0 per sample; `num_samples` (default: as many as the data has) is the length of an
    epoch. Raises UserError for weights that are negative, not finite, or all 0.
    """
    found = np.asarray(weights)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "biuf":
        raise UserError(f"orders.weighted(): must be given one number per sample, not {_shown(found)}")
    found = found.astype("<f8")
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        raise UserError(
            f"orders.weighted(): a weight must be a finite number from 0; that of sample {bad[0]} is {found[bad[0]]}"
        )
    total = np.cumsum(found)
    if not 0 < total[-1] < np.inf:
        raise UserError(f"orders.weighted(): the sum of the weights is {total[-1]}; at least one must be above 0")
    ends = np.floor(total / total[-1] * 2.0**_BITS).astype(np.int64)

    def draw(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        draws = sample_seeds(derive_seed(seed, "weighted"), epoch, positions) >> (63 - _BITS)
        return np.searchsorted(ends, draws, side="right")

    return _Order(
        name="weighted",
        num_samples=_count("weighted", num_samples, len(found)),
        num_in_data=len(found),
        array=found,
        draw=draw,
    )


def balanced(classes: Any, *, num_samples: int | None = None) -> Order:
    """Return an order with equally many samples of each class, shuffled.

    `classes` has one integer per sample; `num_samples` (default: as many as the data has) is the length of an epoch.
    The samples of a class come in turn, so that those of a small class come again, and of a large one others come in
    each epoch.
    """
    numbers, members = _members("balanced", classes)
    count = _count("balanced", num_samples, len(numbers))

    def draw(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        shuffled = Permutation(count, derive_seed(seed, "balanced", epoch))(positions)
        places, of_class = np.divmod(shuffled, len(members))
        found = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(of_class).tolist():
            here = of_class == number
            mine = members[number]
            found[here] = mine[_in_turn(len(mine), places[here], seed, "balanced class", epoch, number)]
        return found

    return _Order(name="balanced", num_samples=count, num_in_data=len(numbers), array=numbers.astype("<i8"), draw=draw)


def per_class(classes: Any, *, num_classes: int, samples_per_class: int, num_samples: int | None = None) -> Order:
    """Return an order of groups: some samples of each of some classes (P x K), drawn anew for each group.

    `classes` has one integer per sample. A group has `num_classes` different classes with `samples_per_class` samples
    each, which differ where the class has so many. The micro-batch size must be a multiple of the group's, so that a
    loss that compares samples has them in one micro-batch. `num_samples` (default: as many as the data has) is the
    length of an epoch, of which whole groups are taken.
    """
    numbers, members = _members("per_class", classes)
    group = _count("per_class", num_classes) * _count("per_class", samples_per_class)
    if num_classes > len(members):
        raise UserError(f"orders.per_class(): {num_classes} classes per group, but the data has {len(members)}")
    count = _count("per_class", num_samples, len(numbers)) // group * group
    if not count:
        raise UserError(f"orders.per_class(): a group has {group} samples, an epoch has fewer. Make groups smaller.")

    def of_group(seed: int, epoch: int, number: int) -> np.ndarray:
        chosen = Permutation(len(members), derive_seed(seed, "group", epoch, number))(np.arange(num_classes))
        places = np.arange(samples_per_class)
        each = [
            members[one][_in_turn(len(members[one]), places, seed, "of class", epoch, number, one)]
            for one in chosen.tolist()
        ]
        return np.concatenate(each)

    def draw(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        groups, places = np.divmod(positions, group)
        unique, inverse = np.unique(groups, return_inverse=True)
        return np.stack([of_group(seed, epoch, number) for number in unique.tolist()])[inverse, places]

    return _Order(
        name="per-class",
        num_samples=count,
        num_in_data=len(numbers),
        array=numbers.astype("<i8"),
        settings=(num_classes, samples_per_class),
        fixes_batches=True,
        group_size=group,
        draw=draw,
    )


def repeated(times: Any) -> Order:
    """Return a shuffled order in which each sample comes several times per epoch: one integer from 0 per sample."""
    found = np.asarray(times)
    if found.ndim != 1 or found.dtype.kind not in "biu" or (found < 0).any() or not found.any():
        raise UserError(
            f"orders.repeated(): must be given one whole number from 0 per sample, not all 0, not {_shown(found)}"
        )
    ends = np.cumsum(found.astype("<i8"))
    count = int(ends[-1])

    def draw(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        shuffled = Permutation(count, derive_seed(seed, "repeated", epoch))(positions)
        return np.searchsorted(ends, shuffled, side="right")

    return _Order(name="repeated", num_samples=count, num_in_data=len(found), array=ends, draw=draw)


def curriculum(difficulty: Any, *, epochs: int, start: float = 0.2) -> Order:
    """Return an order that begins with the easiest samples.

    `difficulty` has one number per sample. Epoch 0 has the easiest part `start` of the samples, shuffled, again and
    again until it is as long as the data; each of the `epochs` after it has a larger part, and from then on all.
    """
    found = np.asarray(difficulty)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "biuf" or not np.isfinite(found).all():
        raise UserError(f"orders.curriculum(): must be given one finite number per sample, not {_shown(found)}")
    if not 0 < start <= 1:
        raise UserError(f"orders.curriculum(): start must be above 0 and at most 1, not {start}")
    duration = _count("curriculum", epochs)
    by_difficulty = np.argsort(found, kind="stable").astype("<i8")
    count = len(found)

    def draw(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        part = min(1.0, start + (1 - start) * epoch / duration)
        size = max(1, min(count, round(part * count)))
        chosen: np.ndarray = by_difficulty[_in_turn(size, positions, seed, "curriculum", epoch)]
        return chosen

    return _Order(
        name="curriculum",
        num_samples=count,
        num_in_data=count,
        array=by_difficulty,
        settings=(duration, start),
        draw=draw,
    )


def own(function: Callable[[int, int], Any], *, num_samples: int) -> Order:
    """Return the order of a function `function(seed, epoch)` that returns all samples of an epoch, an array.

    It must return the same whenever it is asked, and draw random numbers by the seed that it is given
    (`np.random.default_rng((seed, epoch))`), or from the global generators, which are seeded before it is called. The
    order of one epoch is kept in memory.
    """
    if not callable(function):
        raise UserError(
            f"orders.own(): takes a function of seed and epoch, not {type(function).__name__}; for a fixed order: "
            f"lambda seed, epoch: indices"
        )
    return _Own(function, _count("own", num_samples))


class _Own:
    """The order of a function, of which the last epoch is kept."""

    fixes_batches = True

    def __init__(self, function: Callable[[int, int], Any], num_samples: int) -> None:
        self.num_samples = num_samples
        self._function = function
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of an epoch. Raises UserError if the function returns other than as many."""
        if self._kept is None or self._kept[0] != (seed, epoch):
            found = np.asarray(self._function(seed, epoch))
            if found.shape != (self.num_samples,) or found.dtype.kind not in "iu":
                raise UserError(
                    f"orders.own(): the function must return {self.num_samples:,} whole numbers per epoch "
                    f"(num_samples); for epoch {epoch} it returned {_shown(found)}"
                )
            self._kept = (seed, epoch), found
        chosen: np.ndarray = self._kept[1][positions]
        return chosen


def digest_of(order: Order, seed: int) -> str:
    """Return what an order follows from; if it does not say, a digest of samples of two epochs, at most 4 million."""
    if hasattr(order, "digest"):
        return str(order.digest())
    digest = xxhash.xxh3_64(str(order.num_samples).encode())
    for epoch in (0, 1):
        for first in range(0, min(order.num_samples, _MOST_DIGESTED), _DIGESTED_AT_ONCE):
            positions = np.arange(first, min(first + _DIGESTED_AT_ONCE, order.num_samples))
            digest.update(np.ascontiguousarray(order.samples(seed, epoch, positions), dtype="<i8").data)
    return f"{type(order).__name__.strip('_')} {digest.hexdigest()}"


def _in_turn(size: int, places: np.ndarray, *key: int | str) -> np.ndarray:
    """Return numbers below `size` at places of a sequence of permutations, each of which has them all."""
    rounds, places = np.divmod(places, size)
    found = np.empty(len(places), dtype=np.int64)
    for number in np.unique(rounds).tolist():
        here = rounds == number
        found[here] = Permutation(size, derive_seed(*key, number))(places[here])
    return found


def _members(name: str, classes: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the classes as numbers from 0, and the samples of each."""
    found = np.asarray(classes)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "biuUSO":
        raise UserError(f"orders.{name}(): must be given one class per sample, not {_shown(found)}")
    _, numbers, counts = np.unique(found, return_inverse=True, return_counts=True)
    return numbers, np.split(np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1])


def _count(name: str, number: int | None, default: int = 0) -> int:
    number = default if number is None else number
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise UserError(f"orders.{name}(): a number of samples, classes or epochs must be from 1, not {number!r}")
    return int(number)


def _shown(found: np.ndarray) -> str:
    return f"{found.dtype} of shape {list(found.shape)}"

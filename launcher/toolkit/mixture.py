"""Several data sets as one, mixed by weights."""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import IterableDataset

from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.order import Order, OrderedData
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.training.mixing import MixedOrder, Shuffled, Stage, pattern_of

_WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")


class Mixture:
    """A map-style data set of several, which are mixed by weights when it is trained on, and evaluated as a whole.

    `sources` has pairs of a data set and its weight: a number from 0, of which only the proportions matter. `names` are
    what messages call them. Rows of the data sets must be alike.
    """

    def __init__(self, sources: Sequence[tuple[Any, float | str]], *, names: Sequence[str] = ()) -> None:
        if len(sources) < 2:
            raise UserError(f"a Mixture needs two data sets or more, each with a weight; it was given {len(sources)}")
        self.parts = [data for data, _ in sources]
        self._weights = tuple(str(weight) for _, weight in sources)
        self._names = names or [f"source {number}" for number in range(1, len(sources) + 1)]
        for name, part in zip(self._names, self.parts, strict=True):
            has_rows = hasattr(part, "__len__") and hasattr(part, "__getitem__")
            if not has_rows or isinstance(part, IterableDataset):
                kind = type(part).__name__
                raise UserError(f"{name} of the Mixture is a {kind}: it needs a length, and rows by number")
            if not len(part):
                raise UserError(f"{name} of the Mixture has no rows")
        pattern_of(self._weights)  # raises
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, sample: int) -> Any:
        if not -len(self) <= sample < len(self):
            raise IndexError(sample)
        part, inner, _ = next(self.parts_at(np.array([sample % len(self)])))
        return part[int(inner[0])]

    def parts_at(self, samples: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """Yield each part that some samples are in, their numbers in it, and their places among the samples."""
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(numbers).tolist():
            (places,) = np.nonzero(numbers == number)
            yield self.parts[number], samples[places] - self._starts[number], places

    @property
    def has_blocks(self) -> bool:
        """Whether a part is read block by block."""
        return any(getattr(part, "has_blocks", False) for part in self.parts)

    @property
    def is_stored(self) -> bool:
        """Whether the rows of all parts are as they are stored."""
        return all(getattr(part, "is_stored", False) for part in self.parts)

    def fingerprint(self) -> str:
        """Return a digest of the parts' content."""
        from shardlaunch.launcher.runs.identity import data_fingerprint

        return xxhash.xxh3_128_hexdigest(repr([data_fingerprint(part) for part in self.parts]).encode())

    def shuffled_order(self, options: Options) -> MixedOrder:
        """Return the order of the weights, which --data-weights may change at steps; note it for the run's start."""
        sources: list[Order] = [
            part.shuffled_order(options) if isinstance(part, OrderedData) else Shuffled(len(part))
            for part in self.parts
        ]
        if options.shuffle_window and not self.has_blocks:
            raise UserError("--shuffle-window: has no effect, because the data is not read block by block; remove it")
        order = MixedOrder(sources, self._stages(options))
        for number, stage in enumerate(order.stages):
            passes = order.passes_per_epoch(number)
            shown = ", ".join(
                f"{name} {weight} ({times:.2f} times per epoch)"
                for name, weight, times in zip(self._names, stage.weights, passes, strict=True)
            )
            since = f" from sample {stage.first_sample:,} on" if number else ""
            current().data.append(f"mixed by weights{since}: {shown}")
        return order

    def _stages(self, options: Options) -> list[Stage]:
        """Return the weights at the start, and those of --data-weights. Raises UserError for what is none."""
        weights = {0: self._weights}
        last = -1
        for text in options.data_weights:
            step, _, rest = text.partition(":")
            words = tuple(word.strip() for word in rest.split(","))
            where = f"--data-weights {text}"
            if not step.isascii() or not step.isdigit() or not rest:
                raise UserError(f"{where}: must be STEP:WEIGHT,WEIGHT,..., such as 1000:0.5,0.5")
            if int(step) <= last:
                raise UserError(f"{where}: steps must be in ascending order")
            if len(words) != len(self.parts):
                raise UserError(f"{where}: has {len(words)} weights for {len(self.parts)} sources")
            try:
                pattern_of(words)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            last = int(step)
            weights[last] = words
        for number, name in enumerate(self._names):
            if all(not Fraction(stage[number]) for stage in weights.values()):
                raise UserError(f"{name} of the data has a weight of 0 throughout; remove it")
        steps_per_epoch = -(-len(self) // options.global_batch_size)
        stages = []
        for first_step, stage in weights.items():
            epoch, place = divmod(first_step, steps_per_epoch)
            stages.append(Stage(epoch * len(self) + place * options.global_batch_size, stage))
        return stages

    def hold_samples(self, order: Any, span: int) -> None:
        """Prepare the parts that are read block by block for their orders."""
        if isinstance(order, MixedOrder):
            for part, source in zip(self.parts, order.sources, strict=True):
                if isinstance(part, OrderedData):
                    part.hold_samples(source, span)


def sources_of(text: str) -> list[tuple[str, str]]:
    """Return the sources of --data with their weights, SOURCE:WEIGHT and several of these; [] if it is no mixture."""
    try:
        words = [word.rpartition(":") for word in shlex.split(text)]
    except ValueError:  # a quote without its other half
        return []
    is_mixture = len(words) > 1 and all(source and _WEIGHT.fullmatch(weight) for source, _, weight in words)
    return [(source, weight) for source, _, weight in words] if is_mixture else []


def load_sources(text: str, load: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the data sets `train` and `eval` that `load` returns of --data, of a mixture those of each source.

    Those of the sources after the first one have names that begin so, and end with the source; `mixed` puts all
    together when they are prepared.
    """
    sources = sources_of(text)
    if not sources:
        return dict(load(text))
    found: dict[str, Any] = {}
    notes = current()
    shown: dict[str, str] = {}
    for number, (source, _) in enumerate(sources):
        if source in dict(sources[:number]):
            raise UserError(f"--data {text}: {source} is given twice; name it once")
        for name, split in load(source).items():
            found[f"{name} of {source}" if number else name] = split
        shown |= {f"{name} of {source}": line for name, line in notes.splits.items()}
        notes.splits.clear()
    notes.splits.update(shown)
    return found


def role_of(name: str) -> str:
    """Return what a data set is for, `train` or `eval`, by its name of `load_sources`."""
    return name.partition(" ")[0]


def of_training(splits: Mapping[str, Any]) -> list[Any]:
    """Return the training data of each source, of data sets as `load_sources` names them."""
    return [split for name, split in splits.items() if role_of(name) == "train"]


def mixed(splits: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return the data sets `train` and `eval` of those that `load_sources` returned, as a `Mixture` of several.

    The evaluation data is that of all sources, without weights.
    """
    sources = sources_of(text)
    if not sources:
        return dict(splits)
    names = [source for source, _ in sources]
    train = Mixture(
        [(split, weight) for split, (_, weight) in zip(of_training(splits), sources, strict=True)], names=names
    )
    held_out = [(split, 1) for name, split in splits.items() if role_of(name) == "eval"]
    return {"train": train, "eval": Mixture(held_out) if len(held_out) > 1 else held_out[0][0]}

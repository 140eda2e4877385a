"""The first difference between the records of two runs (see `training.recording`)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

import msgspec

from shardlaunch.launcher.training.recording import (
    BACKWARD,
    BATCH,
    FORWARD,
    OF_STEP,
    RECORDS,
    START,
    SUM,
    UPDATE,
    Event,
)

_STAGES = {
    START: "before the first step",
    BATCH: "batch",
    FORWARD: "forward",
    BACKWARD: "backward",
    SUM: "sum",
    UPDATE: "update",
}
_MEANINGS = {
    START: "the runs begin with other weights: model(), weights() or what they read is not the same each time",
    BATCH: "the data are not the same: datasets(), lengths(), the data set's rows or collate()",
    FORWARD: "weights and batch agree: the model or loss() computes otherwise, draws numbers that the launcher has not "
    "seeded, or keeps a state of its own",
    BACKWARD: "the forward pass agrees: an operation computes its gradient otherwise",
    SUM: "the gradients of all micro-batches agree: their sum does not",
    UPDATE: "the gradients agree: the optimizer, or what it keeps, does not",
}


class _Key(NamedTuple):
    """What is recorded, of one step."""

    stage: int
    micro_batch: int
    what: str
    occurrence: int


@dataclass(kw_only=True)
class _Value:
    """What all ranks have recorded of it."""

    order: tuple[int, int]
    where: str
    parts: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """Digest and rank of each range, or of each rank."""
    unequal_ranks: tuple[int, int] | None = None
    """Two ranks of which each has other values of the same range."""

    @property
    def digest(self) -> int:
        digest = 0
        for part, _ in self.parts.values():
            digest ^= part
        return digest


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first value that two runs have otherwise."""

    step: int
    stage: str
    micro_batch: int | None
    """From 1; None for what is of the step."""
    what: str
    where: str
    """Module or method that made it of what agrees; empty: that of the stage."""
    how: str
    meaning: str

    def describe(self) -> str:
        """Return the place in words."""
        place = f"step {self.step}"
        if self.micro_batch is not None:
            place += f", micro-batch {self.micro_batch}"
        made_by = f", made by {self.where}" if self.where else ""
        return f"{place}, {self.stage}: {self.what}{made_by}{self.how}"


def first_difference(one: Path, other: Path) -> Difference | None:
    """Return the first difference between the records in two output folders, None if there is none.

    First by step, then by stage, by micro-batch, and by time.
    """
    for ours, theirs in zip_longest(_steps(one), _steps(other)):
        step, mine = ours or (theirs[0], {})
        its = theirs[1] if theirs is not None else {}
        found = _first_of_step(step, mine, its)
        if found is not None:
            return found
    return None


def num_recorded(output_dir: Path) -> tuple[int, int]:
    """Return how many steps and values a record has."""
    sizes = [len(values) for _, values in _steps(output_dir)]
    return len(sizes), sum(sizes)


def _first_of_step(step: int, mine: dict[_Key, _Value], its: dict[_Key, _Value]) -> Difference | None:
    def place(key: _Key) -> tuple[int, int, tuple[int, int]]:
        return key.stage, key.micro_batch, (mine.get(key) or its[key]).order

    for key in sorted({**mine, **its}, key=place):
        ours, theirs = mine.get(key), its.get(key)
        unequal = [value.unequal_ranks for value in (theirs, ours) if value is not None and value.unequal_ranks]
        if ours is None or theirs is None:
            how = f" (only {'the second' if ours is None else 'the first'} run has it)"
        elif unequal:
            how = " (rank {} has other values than rank {})".format(*reversed(unequal[0]))
        elif ours.digest != theirs.digest:
            how = ""
        else:
            continue
        return Difference(
            step=step,
            stage=_STAGES[key.stage],
            micro_batch=None if key.micro_batch == OF_STEP else key.micro_batch + 1,
            what=key.what,
            where=(ours or theirs).where,  # type: ignore[union-attr]
            how=how,
            meaning=_MEANINGS[key.stage],
        )
    return None


def _steps(output_dir: Path) -> Iterator[tuple[int, dict[_Key, _Value]]]:
    """Yield the record of each step, of all ranks together."""
    files = sorted((output_dir / RECORDS).glob("rank-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    ranks = [groupby(_events(path), key=lambda event: event.step) for path in files]
    for of_ranks in zip(*ranks, strict=True):
        values: dict[_Key, _Value] = {}
        for rank, (_, events) in enumerate(of_ranks):
            _add(values, rank, events)
        yield of_ranks[0][0], values


def _add(values: dict[_Key, _Value], rank: int, events: Iterator[Event]) -> None:
    """Add what a rank has recorded of a step."""
    seen: Counter[tuple[int, int, str, int]] = Counter()
    for number, event in enumerate(events):
        name = (event.stage, event.micro_batch, event.what, event.start)
        key = _Key(event.stage, event.micro_batch, event.what, seen[name])
        seen[name] += 1
        value = values.setdefault(key, _Value(order=(rank, number), where=event.where))
        # Ranks that divide a model have other values of one micro-batch each.
        part = (event.start, event.end) if event.micro_batch == OF_STEP else (rank, rank)
        known = value.parts.setdefault(part, (event.digest, rank))
        if known[0] != event.digest and value.unequal_ranks is None:
            value.unequal_ranks = (known[1], rank)


def _events(path: Path) -> Iterator[Event]:
    with open(path, "rb") as file:
        for line in file:
            yield msgspec.json.decode(line, type=Event)

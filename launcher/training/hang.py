"""Which rank all the others wait for."""

from collections.abc import Mapping
from typing import NamedTuple

from shardlaunch.sharding.heartbeats import Beat


class Seen(NamedTuple):
    """A rank's newest beat, and the time since it was new to the one that looks."""

    beat: Beat
    silence_s: float

    @property
    def without_progress_s(self) -> float:
        return self.beat.age_s + self.silence_s

    @property
    def is_over_limit(self) -> bool:
        return self.without_progress_s > self.beat.limit_s


def hung(ranks: Mapping[int, Seen], *, silent_after_s: float) -> list[int]:
    """Return the ranks that have come to a stop; empty while the run may go on.

    Ranks that say nothing have, once their limit is over. Else it is those that are behind, if all of them are over
    their limit: the others wait for them, however long. Nothing has while somebody looks at a rank with a debugger.
    """
    ranks = {rank: seen for rank, seen in ranks.items() if not seen.beat.has_left}
    if any(seen.beat.is_debugged for seen in ranks.values()):
        return []
    silent = {rank: seen for rank, seen in ranks.items() if seen.silence_s > silent_after_s}
    if silent:
        return [rank for rank, seen in silent.items() if seen.is_over_limit]
    late = behind({rank: seen.beat for rank, seen in ranks.items()})
    return late if all(ranks[rank].is_over_limit for rank in late) else []


def behind(beats: Mapping[int, Beat]) -> list[int]:
    """Return the ranks that the others wait for: all, if none is behind another."""
    fewest = min((beat.num_marks for beat in beats.values()), default=0)
    last = {rank: beat for rank, beat in beats.items() if beat.num_marks == fewest}
    # Of those that are equally far, the ones that have not begun a collective in which another waits. A rank that is
    # behind in one group and ahead in another waits itself.
    late = [rank for rank, beat in last.items() if any(_is_ahead(other, beat) for other in last.values())]
    first_of_all = [rank for rank in late if not any(_is_ahead(last[rank], other) for other in last.values())]
    return first_of_all or late or list(last)


def _is_ahead(one: Beat, other: Beat) -> bool:
    """Return whether `one` has begun a collective of a common group that `other` has not."""
    common = one.collectives.keys() & other.collectives.keys()
    return any(one.collectives[name] > other.collectives[name] for name in common)

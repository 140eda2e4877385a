"""What became of a run that met a fault: judged from the ids of the samples of each step, and how it ended."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

GRACE_S = 30.0  # torchrun, Kubernetes and Slurm kill what has not ended after that
Step = tuple[int, ...]
Row = Mapping[str, Any]


def steps_of(folder: Path, start: int) -> list[Step]:
    """Return the ids of the samples of each step that a start began, over all ranks."""
    ranks = []
    for path in sorted(folder.glob(f"ids-{start}-*")):
        # The last line of a process that was killed may be torn.
        ranks.append([json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")])
    return [tuple(sorted(chain.from_iterable(shares))) for shares in zip_longest(*ranks, fillvalue=())]


def num_updates(folder: Path, start: int) -> int:
    """Return how many steps of a start have changed the weights."""
    return max((len(path.read_bytes()) for path in folder.glob(f"updates-{start}-*")), default=0)


def same_data(whole: Sequence[Step], first: Sequence[Step], second: Sequence[Step]) -> bool:
    """Return whether two starts have trained on what an undisturbed run does, in order, without a gap.

    Of the first start, only steps count that have changed the weights.
    """
    begin = len(whole) - len(second)
    is_covered = 0 <= begin <= len(first)
    return is_covered and list(first) == list(whole[: len(first)]) and list(second) == list(whole[begin:])


def num_lost(whole: Sequence[Step], first: Sequence[Step], second: Sequence[Step]) -> int:
    """Return how many steps the second start does again; 0 where it is the one in which the first one saved."""
    again = len(first) - (len(whole) - len(second))
    return again if again > 1 else 0


def is_signal(row: Row) -> bool:
    """Return whether a fault asks to stop: all others leave no time for an answer."""
    return row["fault"].startswith("SIG") and row["fault"] != "SIGKILL"


def is_kill_of_rank(row: Row) -> bool:
    """Return whether a rank was killed that another one waits for."""
    return row["fault"] == "SIGKILL" and "one rank" in row["cell"]


def ends_in_time(row: Row) -> bool:
    """Return whether the first start ended within the grace time, stopped by the fault, with all its processes."""
    is_deaf = is_signal(row) and row["first"]["is_finished"]
    return row["first"]["seconds"] <= GRACE_S and not row["first"]["orphans"] and not is_deaf


def says_so(row: Row) -> bool:
    """Return whether the exit status of the first start tells a run that is to go on from one that is done."""
    return row["first"]["is_finished"] == (row["first"]["status"] == 0)


def loses_nothing(row: Row) -> bool:
    """Return whether the run was finished, and no step but the one in flight was done again."""
    return row["is_finished"] and row["lost"] == 0


# Their words, which of the faults they are about, and what they count.
_MEASURES: Sequence[tuple[str, Callable[[Row], bool], Callable[[Row], bool]]] = (
    (f"signals: ends within {GRACE_S:.0f} s, no process left", is_signal, ends_in_time),
    ("signals: exit status 0 only if finished", is_signal, says_so),
    ("signals: no step lost but the one in flight", is_signal, loses_nothing),
    (
        f"a rank killed: the others end within {GRACE_S:.0f} s",
        is_kill_of_rank,
        ends_in_time,
    ),
    ("the same command finishes the run", lambda row: True, lambda row: row["is_finished"]),
    ("trained on the same samples in the same order", lambda row: True, lambda row: row["is_same_data"]),
    ("final weights equal to the bit", lambda row: True, lambda row: row["is_same_weights"]),
)


def count_table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a table of how many faults went well: a row per measure, a column per tool."""
    tools = list(dict.fromkeys(row["tool"] for row in result["cells"]))
    lines = [("faults survived", *tools)]
    for words, is_about, holds in _MEASURES:
        counts = []
        for tool in tools:
            rows = [row for row in result["cells"] if row["tool"] == tool and is_about(row)]
            counts.append(f"{sum(map(holds, rows))} of {len(rows)}")
        lines.append((words, *counts))
    return lines


def fault_table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a table of what became of each fault: a row per fault, a column per tool."""
    tools = list(dict.fromkeys(row["tool"] for row in result["cells"]))
    names = list(dict.fromkeys(row["cell"] for row in result["cells"]))
    found = {(row["cell"], row["tool"]): verdict(row) for row in result["cells"]}
    return [("fault", *tools), *((name, *(found.get((name, tool), "") for tool in tools)) for name in names)]


def verdict(row: Row) -> str:
    """Return in a few words what a fault led to."""
    words = []
    first = row["first"]
    if is_signal(row) and first["is_finished"]:
        words.append("ignored")
    elif first["seconds"] > GRACE_S:
        words.append("hangs")
    elif first["orphans"]:
        words.append("leaves processes")
    if not row["is_finished"]:
        return ", ".join([*words, "does not resume"])
    if row["lost"]:
        words.append(f"{row['lost']} steps lost")
    if not row["is_same_data"]:
        words.append("other data")
    elif not row["is_same_weights"]:
        words.append("other weights")
    if is_signal(row) and not says_so(row):
        words.append("status 0")
    return ", ".join(words) or "as without"

"""Digests that runs have recorded (--digest-every), compared with a checkpoint's and between runs. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.digests import DIGEST_NAMES
from shardlaunch.checkpoints.finding import runs_at
from shardlaunch.checkpoints.listing import listed_digests, read_listing
from shardlaunch.checkpoints.names import EMA, MODEL, OPTIMIZER
from shardlaunch.checkpoints.verifying import ListedCheckpoint
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.output import warn
from shardlaunch.launcher.reporting.tracking import METRICS_FILE, recorded_digests

_MEANT = {
    DIGEST_NAMES[MODEL]: "weights",
    DIGEST_NAMES[OPTIMIZER]: "optimizer's state",
    DIGEST_NAMES[EMA]: "average of the weights",
}


@dataclass(frozen=True, kw_only=True)
class RunDigests:
    """How the recorded digests of two runs compare, over the steps that both have recorded."""

    num_compared: int
    first_differing: int | None = None
    last_equal: int | None = None
    """The last step before that where they agree."""
    differing: tuple[str, ...] = field(default=())
    """What differs there: loss, weights_digest, optimizer_digest, ema_digest."""

    def document(self) -> dict[str, Any]:
        """Return this for JSON."""
        return asdict(self)

    def describe(self, *, is_exact: bool) -> str:
        """Return a line for a reader; `is_exact`: both runs were to have the same bits."""
        if self.first_differing is None:
            return f"losses and digests agree at all {self.num_compared:,} steps that both runs have recorded"
        since = "from the first step compared" if self.last_equal is None else f"equal until step {self.last_equal:,}"
        what = ", ".join(name.removesuffix("_digest") for name in self.differing)
        text = f"first difference at step {self.first_differing:,}: {what} ({since}; {self.num_compared:,} compared)"
        if not is_exact:
            text += (
                "\nwithout --exact that need be no fault: bits depend on ranks, strategy and threads, and on some "
                "devices on the run"
            )
        return text


def compare_runs(one: Path, other: Path) -> RunDigests | None:
    """Compare what two runs have recorded after each step. None where they have recorded no step in common."""
    both = [_recorded(path) for path in (one, other)]
    steps = sorted(both[0].keys() & both[1].keys())
    last_equal = None
    for step in steps:
        differing = tuple(
            name
            for name in dict.fromkeys([*both[0][step], *both[1][step]])
            if str(both[0][step].get(name)) != str(both[1][step].get(name))  # NaN equals itself, as text does
        )
        if differing:
            return RunDigests(num_compared=len(steps), first_differing=step, last_equal=last_equal, differing=differing)
        last_equal = step
    return RunDigests(num_compared=len(steps), last_equal=last_equal) if steps else None


def are_exact(*checkpoints: ListedCheckpoint) -> bool:
    """Return whether all checkpoints are of runs with --exact."""
    return all(it.recipe is not None and bool(it.recipe.options.get("exact")) for it in checkpoints)


def difference_from_recorded(step_dir: Path, known: dict[Path, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return how a checkpoint's digests differ from those that its run has recorded of its step; empty: they do not.

    `known` is what has been read of runs, by their folders, so that each is read once.
    """
    (run,) = runs_at(step_dir)
    if run.run_dir is None:
        return ""
    if run.run_dir not in known:
        known[run.run_dir] = _recorded(step_dir)
    record = read_listing(step_dir)
    recorded = known[run.run_dir].get(record.step, {})
    for name, digest in listed_digests(record).items():
        if recorded.get(name, digest) != digest:
            what = _MEANT[name]
            path = run.run_dir / METRICS_FILE
            return f"the digest of its {what} is {digest}, but {path} has {recorded[name]} of this step"
    return ""


def _recorded(path: Path) -> Mapping[int, Mapping[str, Any]]:
    """Return what a checkpoint's run has recorded, nothing if that cannot be read, with a warning."""
    runs = runs_at(path)
    if len(runs) != 1 or runs[0].run_dir is None or not os.path.lexists(runs[0].run_dir / METRICS_FILE):
        return {}
    try:
        return recorded_digests(runs[0].run_dir, warn=warn)
    except (UserError, OSError) as error:
        warn(str(error))
        return {}

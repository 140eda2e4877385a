"""`ckpt prune` and `ckpt copy`: delete and copy checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shardlaunch.checkpoints.copying import Copied
from shardlaunch.checkpoints.copying_runs import copy_any
from shardlaunch.checkpoints.finding import BEST, Run, checkpoint_at, runs_at
from shardlaunch.checkpoints.names import REPLACED_PREFIX
from shardlaunch.checkpoints.pruning import Pruning, carry_out, plan_pruning
from shardlaunch.checkpoints.run_lock import locked
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.output import print_json, size, warn

DAMAGED = 1


def prune(path: Path, *, keep: int, dry_run: bool, as_json: bool) -> int:
    """Delete older checkpoints of a run. Return 1 if one of them is damaged."""
    if keep < 1:
        raise UserError(f"--keep {keep}: must be at least 1")
    runs = runs_at(path)
    if any(run.only is not None for run in runs):
        raise UserError(f"{path}: is one checkpoint; give the run's folder")
    prunings = []
    for run in runs:
        with _at_rest(run, dry_run=dry_run):
            pruning = plan_pruning(run, keep=keep)
            if not as_json:
                _say(run, pruning, dry_run=dry_run)
            if not dry_run:
                carry_out(pruning)
        prunings.append(pruning)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "runs": [
                    {
                        "run": str(run.path),
                        "kept": [str(path) for path in pruning.kept],
                        "best": pruning.best and str(pruning.best),
                        "deleted": [str(checkpoint.step_dir) for checkpoint in pruning.deleted],
                        "bytes": pruning.num_bytes,
                        "damaged": list(pruning.damaged),
                        "leftovers": [str(path) for path in pruning.leftovers],
                    }
                    for run, pruning in zip(runs, prunings, strict=True)
                ],
            }
        )
    return DAMAGED if any(pruning.damaged for pruning in prunings) else 0


@contextmanager
def _at_rest(run: Run, *, dry_run: bool) -> Iterator[None]:
    """Hold the run's lock, unless nothing is changed."""
    if dry_run or run.run_dir is None:
        yield
    else:
        with locked(run.run_dir):
            yield


def _say(run: Run, pruning: Pruning, *, dry_run: bool) -> None:
    print(run.path)
    for step_dir in reversed(pruning.kept):
        print(f"  keep    {step_dir.name}{' (best)' if step_dir == pruning.best else ''}")
    if pruning.best is not None and pruning.best not in pruning.kept:
        print(f"  keep    {pruning.best.name} (best)")
    would = "would delete" if dry_run else "delete"
    for checkpoint in reversed(pruning.deleted):
        print(f"  {would}  {checkpoint.step_dir.name}, {size(checkpoint.num_bytes)}")
    for path in pruning.leftovers:
        done = "restore or delete" if path.name.startswith(REPLACED_PREFIX) else "delete"
        print(f"  {'would ' if dry_run else ''}{done}  {path.name}, of a save or deletion that did not end")
    for message in pruning.damaged:
        print(f"  damaged, stays: {message}")
    print(f"  {size(pruning.num_bytes)} {'would be' if dry_run else 'are'} free")


def copy(source: str, target: str, *, step: int | None, as_json: bool) -> int:
    """Copy a checkpoint or a run. Return 1 if a checkpoint of a run is damaged."""
    if "://" not in source and source.rstrip("/").endswith(f"/{BEST}"):
        source = str(checkpoint_at(Path(source), warn=warn))

    def on_copied(copied: Copied) -> None:
        if copied.unlisted:
            warn(f"{copied.source}: not of the checkpoint, and not copied: {', '.join(copied.unlisted)}")
        if not as_json:
            skipped = f", {copied.num_skipped} of {copied.num_files} files were there" if copied.num_skipped else ""
            print(f"{copied.source} -> {copied.target}: {size(copied.num_bytes)} copied and verified{skipped}")

    done = copy_any(source, target, step=step, on_copied=on_copied)
    for message in done.failed:
        warn(message)
    if as_json:
        print_json(msgspec.to_builtins(done))
    elif done.records:
        print(f"{', '.join(dict.fromkeys(done.records))} copied")
    return DAMAGED if done.failed else 0

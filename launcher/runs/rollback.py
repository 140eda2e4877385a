"""Going back to a checkpoint without the global batches after which the loss was bad."""

from collections.abc import Sequence
from pathlib import Path

from shardlaunch.checkpoints.files import discard
from shardlaunch.checkpoints.layout import CHECKPOINTS, TRAINER_STATE, step_dir_name
from shardlaunch.checkpoints.reader import checkpoint_steps
from shardlaunch.checkpoints.records import DamagedRecord, LeftOut, Position, RunRecord, read_record
from shardlaunch.errors import UserError
from shardlaunch.launcher.runs.folder import RUN
from shardlaunch.launcher.runs.identity import Identity
from shardlaunch.launcher.training.bad_numbers import RollBack

MOST = 10  # rollbacks to one checkpoint, or for one step after the other


def left_out_of(output_dir: Path, identity: Identity) -> list[LeftOut]:
    """Return what the run in a folder leaves out, if it is this run: also what no checkpoint knows of yet."""
    try:
        saved = read_record(output_dir / RUN, RunRecord)
    except DamagedRecord:  # or none yet
        return []
    return saved.left_out if saved.identity == identity.identity else []


def with_rollback(left_out: Sequence[LeftOut], back: RollBack, *, count: int, newest: int) -> list[LeftOut]:
    """Return what to leave out after one more rollback: `count` batches up to the one whose loss was bad.

    `newest` is the step of the newest checkpoint before these. Raises UserError if going back there does not help.
    """
    num_since = sum(each.last > newest for each in left_out)
    lasts = {each.last for each in left_out}
    num_in_a_row = next(n for n in range(len(lasts) + 1) if back.step - 1 - n not in lasts)
    if max(num_since, num_in_a_row) >= MOST:
        raise UserError(
            f"{back}; stopped, since {MOST} rollbacks before have not helped. Try a smaller --lr or --max-grad-norm, "
            f"or a larger --leave-out. The last checkpoint is still valid."
        )
    return [*left_out, LeftOut(first=max(1, back.step - count + 1), last=back.step, cause=back.cause)]


def delete_superseded(output_dir: Path, left_out: Sequence[LeftOut]) -> None:
    """Delete the checkpoints that were trained on what is left out now. Rank 0. Raises OSError if one stays."""
    checkpoints_dir = output_dir / CHECKPOINTS
    for step in checkpoint_steps(checkpoints_dir) if left_out else []:
        step_dir = checkpoints_dir / step_dir_name(step)
        try:
            known = read_record(step_dir / TRAINER_STATE, Position).left_out
        except DamagedRecord:
            continue  # it is not resumed from either
        if any(each.first <= step and each not in known for each in left_out):
            discard(step_dir)

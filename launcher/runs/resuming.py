"""What a start compares with the run that an output folder or a checkpoint holds."""

from collections.abc import Callable
from pathlib import Path

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.launcher.runs.folder import identity_of_folder
from shardlaunch.launcher.runs.identity import Identity


def identity_in_folder(identity: Identity, output_dir: Path, *, peers: Peers, hint: str) -> Identity:
    """Return the identity of a run in the order of the one that its output folder holds. All ranks.

    Raises UserError if that is another run.
    """
    found = peers.together(lambda: identity_of_folder(output_dir))
    if found is None:
        return identity
    identity.check(found, str(output_dir), hint=hint)
    return identity.in_order_of(found)


def identity_of_resume(
    identity: Identity, checkpoint: Checkpoint, *, hint: str, warn: Callable[[str], None]
) -> Identity:
    """Return the identity of a run in the order of the one that a checkpoint is of; warn of what may round otherwise.

    Raises UserError if that is another run.
    """
    saved = checkpoint.recipe.run
    for difference in identity.check(saved, str(checkpoint.step_dir), hint=hint):
        warn(f"this resume may round differently: {difference}")
    return identity.in_order_of(saved)

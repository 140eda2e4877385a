"""Restore the state of a run from a checkpoint."""

from collections.abc import Callable

import torch

from shardlaunch.checkpoints.manifest import DamagedCheckpoint
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.state import EMA, OPTIMIZER
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.runs.assembly import Assembly
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.runs.recorded_digests import check_recorded
from shardlaunch.sharding.named_state import group_hyperparameters, restore_group_hyperparameters
from shardlaunch.sharding.optimizers import optimizers_by_name


def restore(
    checkpoint: Checkpoint | None,
    assembly: Assembly,
    options: Options,
    data: RunData,
    *,
    peers: Peers,
    warn: Callable[[str], None],
) -> Position:
    """Restore weights and optimizer from a checkpoint, and return its position; None: that of the beginning. All ranks.

    Raises UserError for a model that is built otherwise than the checkpoint's, and DamagedCheckpoint.
    """
    strategy = assembly.strategy
    if checkpoint is None:
        # Read now, so that an optimizer whose groups cannot be saved is refused before any training.
        return Position(
            group_hyperparameters=group_hyperparameters(strategy.optimizer),
            non_persistent_buffers=assembly.non_persistent_buffers,
        )
    position = checkpoint.position
    if position.non_persistent_buffers != assembly.non_persistent_buffers:
        raise UserError(
            f"{checkpoint.step_dir}: the model's non-persistent buffers differ from the checkpoint's: its "
            f"constructor has changed or draws them at random. Register them with persistent=True"
        )
    if adapters := assembly.adapters:
        peers.together(lambda: adapters.check_base(checkpoint) if peers.rank == 0 else None)
    with phase("loading the checkpoint"):
        try:
            strategy.restore(checkpoint)
        except UserError:
            checkpoint.verify_read(peers)  # damage may look like another model; all ranks come here, or none
            raise
        checkpoint.verify_read(peers)
    if strategy.average is not None:
        if bool(position.num_averaged) is not any(spec.section == EMA for spec in checkpoint.specs()):
            raise DamagedCheckpoint(
                f"{checkpoint.step_dir}: its average of the weights is not that of {position.num_averaged} updates, as "
                f"its position says"
            )
        strategy.average.num_updates = position.num_averaged
    if options.digest_every:
        check_recorded(checkpoint, strategy, peers=peers)
    if position.step and not any(spec.section == OPTIMIZER for spec in checkpoint.specs()):
        kinds = {type(one) for one in optimizers_by_name(strategy.optimizer).values()}
        if kinds != {torch.optim.SGD} or any(group["momentum"] for group in strategy.optimizer.param_groups):
            names = " and ".join(sorted(kind.__name__ for kind in kinds))
            warn(
                f"{checkpoint.step_dir}: holds no optimizer state, so that {names} starts anew; this is right only if "
                f"it keeps none"
            )
    if position.step != options.unfreeze_at_step:  # there, the parameter groups change
        restore_group_hyperparameters(strategy.optimizer, position.group_hyperparameters)
    # A run also ends by early stopping. A run that is extended is no longer finished at its original end, and an
    # extended run may be further than the last step of this command.
    ended_early = position.is_finished and position.step < data.num_steps
    is_at_end = position.step >= data.last_step and not position.is_evaluation_due
    position.is_finished = position.has_stopped_early or ended_early or is_at_end
    return position

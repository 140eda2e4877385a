"""Restore the state of a run from a checkpoint."""

from collections.abc import Callable

import torch

from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.state import OPTIMIZER
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.runs.assembly import Assembly
from shardlaunch.sharding.named_state import group_hyperparameters, restore_group_hyperparameters


def restored(
    checkpoint: Checkpoint | None,
    assembly: Assembly,
    *,
    unfreeze_at_step: int,
    num_steps: int,
    last_step: int,
    warn: Callable[[str], None],
) -> Position:
    """Restore model and optimizer, and return the position (None: that of the beginning). All ranks.

    `num_steps` is the length of the run, `last_step` where this command ends. Raises UserError for a model whose
    non-persistent buffers differ from those that were saved.
    """
    optimizer = assembly.strategy.optimizer
    if checkpoint is None:
        # Read now, so that an optimizer whose groups cannot be saved is refused before any training.
        return Position(
            group_hyperparameters=group_hyperparameters(optimizer),
            non_persistent_buffers=assembly.non_persistent_buffers,
        )
    position = checkpoint.position
    if position.non_persistent_buffers != assembly.non_persistent_buffers:
        raise UserError(
            f"{checkpoint.step_dir}: the model's non-persistent buffers differ from the checkpoint's: its "
            f"constructor has changed or draws them at random. Register them with persistent=True"
        )
    with phase("loading the checkpoint"):
        assembly.strategy.restore(checkpoint)
    if position.step and not any(spec.section == OPTIMIZER for spec in checkpoint.specs()):
        kind = type(optimizer)
        if kind is not torch.optim.SGD or any(group["momentum"] for group in optimizer.param_groups):
            warn(
                f"{checkpoint.step_dir}: holds no optimizer state, so that {kind.__name__} starts anew; this is "
                f"right only if it keeps none"
            )
    if position.step != unfreeze_at_step:  # there, the parameter groups change
        restore_group_hyperparameters(optimizer, position.group_hyperparameters)
    # A run also ends by early stopping. A run that is extended is no longer finished at its original end, and an
    # extended run may be further than the last step of this command.
    ended_early = position.is_finished and position.step < num_steps
    is_at_end = position.step >= last_step and not position.is_evaluation_due
    position.is_finished = position.has_stopped_early or ended_early or is_at_end
    return position

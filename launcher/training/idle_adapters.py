"""Adapters of LoRA that the loss does not reach are found after the first update: their factor B is still zero."""

from collections.abc import Callable
from typing import Any

from shardlaunch.checkpoints.names import ADAPTER_PREFIX
from shardlaunch.checkpoints.state import MODEL
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.recorder import StepReport
from shardlaunch.launcher.training.step_sums import CountedBatch
from shardlaunch.launcher.training.trainer import Trainer

_FACTOR = ".lora_B.weight"


class AdapterWatch:
    """Looks at the adapters of a run after its first update, in the place of the trainer's `train_step`.

    All begin with zeros for B, which the first update changes wherever a gradient arrives, under every strategy.
    """

    def __init__(self, trainer: Trainer, *, warn: Callable[[str], None]) -> None:
        self._trainer = trainer
        self._warn = warn
        self._is_done = False
        self._train_step = trainer.train_step
        trainer.train_step = self._step  # type: ignore[method-assign, assignment]

    def _step(self, counted: CountedBatch, *others: Any) -> tuple[StepReport, CountedBatch]:
        report, upcoming = self._train_step(counted, *others)
        if not (self._is_done or report.is_skipped) and report.lr > 0:
            self._is_done = True
            self._check()
        return report, upcoming

    def _check(self) -> None:
        """Warn of adapters without a gradient. All ranks. Raises UserError if there are no others."""
        fragments = (one for one in self._trainer.strategy.state() if one.spec.section == MODEL)
        moved = {one.spec.name: bool(one.tensor.any()) for one in fragments if one.spec.name.endswith(_FACTOR)}
        has_moved = self._trainer.world.peers.most([*map(int, moved.values())])
        names = [name.removeprefix(ADAPTER_PREFIX).removesuffix(_FACTOR) for name in moved]
        idle = [name for name, flag in zip(names, has_moved, strict=True) if not flag]
        if not idle:
            return
        where = f"{len(idle)} of {len(names)} adapters: {some(idle)}"
        if len(idle) == len(names):
            raise UserError(
                f"--lora-rank: no gradient has arrived in the first update at {where}. The loss does not depend on "
                f"these layers; name others with --lora-targets"
            )
        self._warn(
            f"no gradient has arrived in the first update at {where}. If the loss does not depend on these layers, "
            f"they learn nothing: name the others with --lora-targets"
        )

"""Check that all ranks run the same modules in the same order, where running a module is a collective.

Ranks that gather different modules would exchange the wrong shards: silently if the sizes match, otherwise they hang.
A model that skips blocks at random does this, since each micro-batch has its own random numbers.
"""

import re
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.progress import progress
from shardlaunch.sharding.world import World, new_group

PATIENCE = timedelta(minutes=2)
"""How long a rank waits for the others to announce the same new step."""
END = -1
_TIMED_OUT = re.compile(r"time(d )?-?out", re.I)


class Lockstep:
    """Record the sequence of a pass's collectives and check that all ranks follow the same one.

    A step that this rank took at the same position of the previous pass needs no check. A new step is announced, and
    taken once all ranks have announced the same. So the first pass announces every step and later ones none.
    """

    def __init__(self, model: nn.Module, *, world: World) -> None:
        self._world = world
        self._group = new_group(backend=world.host_backend) if world.size > 1 else None
        self._training: list[int] = []
        self._passes = {"": self._training}  # of each optimizer, which may run other modules
        self._evaluating: list[int] = []
        self._steps = self._training
        self._positions = {id(self._training): 0, id(self._evaluating): 0}
        model.register_forward_pre_hook(self._begin_forward, prepend=True)

    def _begin_forward(self, *_: object) -> None:
        self._steps = self._training if torch.is_grad_enabled() else self._evaluating
        if self._steps is self._evaluating:
            self._positions[id(self._steps)] = 0
        if not self._steps and self._world.size > 1:  # one rank may reach the first pass much later
            progress.mark()
            dist.barrier(group=self._world.host_group)

    def name_pass(self, name: str) -> None:
        """Say of which optimizer the training passes are that follow. All ranks."""
        self._training = self._passes.setdefault(name, [])
        self._positions[id(self._training)] = 0

    def begin_backward(self) -> None:
        """Count the steps that follow as part of the training pass."""
        self._steps = self._training

    def end_backward(self) -> None:
        """End a training pass. All ranks."""
        self.step(END)
        self._positions[id(self._training)] = 0

    def step(self, code: int) -> None:
        """Return when all ranks are about to take the same step. Raises UserError when they are not."""
        steps, position = self._steps, self._positions[id(self._steps)]
        self._positions[id(steps)] += 1
        if position < len(steps) and steps[position] == code:
            return
        del steps[position:]
        steps.append(code)
        if self._group is not None and not self._all_take(code):
            raise UserError(
                f"the ranks do not run the same modules in the same order (a module that only some batches use? layer "
                f"dropping?), or one is more than {PATIENCE.seconds} s behind. This strategy gathers modules as they "
                f"run, so it needs the same order on all ranks; use --strategy ddp, zero1 or zero2"
            )

    def _all_take(self, code: int) -> bool:
        codes = torch.tensor([code, -code])
        work = dist.all_reduce(codes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        try:
            work.wait(PATIENCE)
        except RuntimeError as error:
            if _TIMED_OUT.search(str(error)):  # the others take different steps
                return False
            raise
        return codes.tolist() == [code, -code]

"""See to it that all ranks run the same modules in the same order, where running a module is a collective.

Ranks that gather unlike modules exchange unlike slices: silently, where these are of one size; else they wait for each
other for ever. A model that skips blocks at random does that, for each micro-batch is drawn by itself.
"""

import re
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.sharding.world import World

PATIENCE = timedelta(minutes=2)
"""How long a rank that does something new waits for the others to do the same; they set out together."""
END = -1
_TIMED_OUT = re.compile(r"time(d )?-?out", re.I)


class Lockstep:
    """Hold the sequence of a pass's collectives and see to it that all ranks follow the same one.

    A step that this rank took at the same place of the pass before is taken at once. A new step is announced, and taken
    when all ranks announce the same; the first pass is all announcements, later ones have none.
    """

    def __init__(self, model: nn.Module, *, world: World) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._training: list[int] = []
        self._evaluating: list[int] = []
        self._lockstep = self._training
        self._positions = {id(self._training): 0, id(self._evaluating): 0}
        model.register_forward_pre_hook(self._begin_forward, prepend=True)

    def _begin_forward(self, *_: object) -> None:
        self._lockstep = self._training if torch.is_grad_enabled() else self._evaluating
        if self._lockstep is self._evaluating:
            self._positions[id(self._lockstep)] = 0
        if not self._lockstep and self._world.size > 1:  # the first pass, which one rank may begin much later
            dist.barrier(group=self._world.host_group)

    def begin_backward(self) -> None:
        """Say that what follows belongs to the training pass."""
        self._lockstep = self._training

    def end_backward(self) -> None:
        """Say that a training pass is over. All ranks."""
        self.step(END)
        self._positions[id(self._training)] = 0

    def step(self, code: int) -> None:
        """Go on when all ranks are about to take the same step. Raises UserError when they are not."""
        course, position = self._lockstep, self._positions[id(self._lockstep)]
        self._positions[id(course)] += 1
        if position < len(course) and course[position] == code:
            return
        del course[position:]
        course.append(code)
        if self._group is not None and not self._all_take(code):
            raise UserError(
                f"the ranks do not run the same modules in the same order (a module that only some batches use, layer "
                f"dropping?), or one is more than {PATIENCE.seconds} s behind; where modules are gathered "
                f"as they run, they must. Use --strategy ddp, zero1 or zero2"
            )

    def _all_take(self, code: int) -> bool:
        codes = torch.tensor([code, -code])
        work = dist.all_reduce(codes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        try:
            work.wait(PATIENCE)
        except RuntimeError as error:
            if _TIMED_OUT.search(str(error)):  # the others go another way
                return False
            raise
        return codes.tolist() == [code, -code]

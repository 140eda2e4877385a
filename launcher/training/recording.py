"""A record of steps for `shardlaunch parity`: digests of batches, results, gradients, sums and states, by rank.

A run is recorded where RECORD_VARIABLE asks for it. Two records are compared by `commands.first_difference`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from shardlaunch.checkpoints.digests import crc64nvme, shifted
from shardlaunch.checkpoints.state import EMA, MODEL, Fragment
from shardlaunch.checkpoints.state_digests import crc_of
from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT
from shardlaunch.launcher.reporting.recorder import StepReport
from shardlaunch.launcher.training.batches import GlobalBatch, MicroBatch
from shardlaunch.launcher.training.forward import Forward
from shardlaunch.launcher.training.module_record import CALLER, ModuleRecord, place_of
from shardlaunch.launcher.training.step_sums import CountedBatch
from shardlaunch.launcher.training.trainer import Trainer
from shardlaunch.launcher.training.value_digests import digest_of, leaves_of
from shardlaunch.sharding.gradient_leaves import gradient_leaves
from shardlaunch.sharding.named_state import optimized
from shardlaunch.sharding.parts import part_of
from shardlaunch.sharding.shards import fragment, local_shard

RECORD_VARIABLE = "SHARDLAUNCH_RECORD"
"""If it is set, the steps of a run are recorded in a folder of its output folder."""
RECORDS = "records"
START, BATCH, FORWARD, BACKWARD, SUM, UPDATE = range(6)
"""The stages of a step, in their order; the first is what is there before the first step."""
OF_STEP = -1
"""In place of the number of a micro-batch."""


class Event(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A value that a rank has seen: all of a tensor, or a range of it.

    `where` is the code that has made it from what was recorded before: a module, a method of the recipe.
    """

    step: int
    stage: int
    micro_batch: int
    what: str
    where: str
    start: int
    end: int
    digest: int
    """CRC of a whole value; of a range, what it adds by xor to that of the whole."""


def record_if_asked(trainer: Trainer, output_dir: Path) -> None:
    """Record the steps of a trainer below its output folder, if the environment asks for it."""
    if os.environ.get(RECORD_VARIABLE):
        folder = output_dir / RECORDS
        folder.mkdir(parents=True, exist_ok=True)
        Recording(trainer, folder / f"rank-{trainer.world.rank}.jsonl")


class Recording:
    """Records the steps of a trainer: it takes the place of what the trainer calls, which stays as it is without."""

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self._strategy = trainer.strategy
        self._path = path
        self._events: list[Event] = []
        self._batch: GlobalBatch | None = None
        self._num_slots = 0  # that have run in this try of the step
        self._stage = START
        self._micro_batch: int | None = None  # None: one that only keeps the ranks in step
        self._leaves: set[int] = set()
        self._has_begun = False
        self._modules = ModuleRecord(self._strategy.replicas, self._add)
        trainer.train_step = partial(self._step, trainer.train_step)  # type: ignore[method-assign]
        trainer.updater.forward = partial(self._forward, trainer.updater.forward)
        finish = partial(self._finish_gradients, self._strategy.finish_gradients)
        self._strategy.finish_gradients = finish  # type: ignore[method-assign]

    def _step(
        self, train_step: Callable[..., tuple[StepReport, CountedBatch]], counted: CountedBatch, *others: Any
    ) -> tuple[StepReport, CountedBatch]:
        self._batch, self._num_slots, self._events = counted.batch, 0, []
        if not self._has_begun:
            self._has_begun = True
            self._add_state(START, self._strategy.state())
        report, upcoming = train_step(counted, *others)
        self._micro_batch, self._stage = OF_STEP, SUM
        for what, value in (("the number of targets", counted.num_targets), ("the loss", report.loss)):
            self._add(what, "", crc64nvme(repr(value).encode()))
        self._add_state(UPDATE, self._strategy.state())
        with open(self._path, "ab") as file:
            file.writelines(msgspec.json.encode(event) + b"\n" for event in self._events)
        self._micro_batch = None  # an evaluation may follow
        return report, upcoming

    def _forward(
        self,
        forward: Callable[..., Forward],
        recipe: Any,
        model: nn.Module,
        micro_batch: MicroBatch,
        *others: Any,
        **settings: Any,
    ) -> Forward:
        assert self._batch is not None
        if self._num_slots == len(self._batch.micro_batches):  # the step is run again
            self._events = [event for event in self._events if event.stage == START]
            self._num_slots = 0
        self._num_slots += 1
        self._micro_batch, self._stage = (micro_batch.index if micro_batch.weight else None), BATCH
        self._add_values("the batch", "collate() or the data", micro_batch.inputs)
        self._add("num_targets() of the batch", "num_targets()", crc64nvme(repr(micro_batch.num_targets).encode()))
        self._stage = FORWARD
        self._modules.begin()
        done = forward(recipe, model, micro_batch, *others, **settings)
        self._add_values("the outputs", CALLER, done.outputs)
        self._add_values("the loss", "loss()", done.loss)
        self._stage = BACKWARD
        for name, leaf in gradient_leaves(model):
            if id(leaf) not in self._leaves:
                self._leaves.add(id(leaf))
                owner = name.rpartition(".")[0]
                leaf.register_hook(partial(self._gradient, name, place_of(owner, model.get_submodule(owner))))
        return done

    def _gradient(self, name: str, owner: str, gradient: torch.Tensor) -> None:
        self._add_values(f"the gradient of {name}", owner, local_shard(gradient))

    def _finish_gradients(self, finish_gradients: Callable[..., float], **settings: Any) -> float:
        norm = finish_gradients(**settings)
        self._add_state(SUM, self._gradients())
        self._micro_batch, self._stage = OF_STEP, SUM
        self._add("the norm of the gradient", "", crc64nvme(repr(norm).encode()))
        return norm

    def _gradients(self) -> Iterator[Fragment]:
        for name, parameter in self._strategy.replicas[0].named_parameters():
            gradient = parameter.grad if parameter.grad is not None else optimized(parameter).grad
            if gradient is not None:
                yield fragment(f"the gradient of {name}", gradient, part=part_of(parameter))

    def _add_state(self, stage: int, state: Iterable[Fragment]) -> None:
        self._micro_batch, self._stage = OF_STEP, stage
        for part in state:
            spec = part.spec
            if part.flat_end > part.flat_start or not spec.num_elements:
                num_after = (spec.num_elements - part.flat_end) * BYTES_PER_ELEMENT[spec.dtype]
                digest = shifted(crc_of(part.tensor), num_after)
                owner = {MODEL: "", EMA: "the average of "}.get(spec.section, f"{spec.entry} of ")
                self._add(owner + spec.name, "", digest, start=part.flat_start, end=part.flat_end)

    def _add_values(self, what: str, where: str, value: Any) -> None:
        for path, leaf in leaves_of(value):
            self._add(what + path, where, digest_of(leaf))

    def _add(self, what: str, where: str, digest: int, *, start: int = 0, end: int = 0) -> None:
        if self._micro_batch is not None and self._batch is not None:
            self._events.append(
                Event(
                    step=self._batch.step + 1,
                    stage=self._stage,
                    micro_batch=self._micro_batch,
                    what=what,
                    where=where,
                    start=start,
                    end=end,
                    digest=digest,
                )
            )

"""What each strategy would need for a recipe's run, which of them fit, and what would make one fit."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.planning.cluster import Cluster, step_time_s, wire_bytes
from shardlaunch.launcher.planning.ledger import CannotPlan
from shardlaunch.launcher.planning.memory import Memory, memory_of
from shardlaunch.launcher.planning.simulation import simulate
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.runs.settings import settings_of
from shardlaunch.launcher.training.batch_plan import BUCKET_BATCHES
from shardlaunch.launcher.training.batches import MicroBatch, Slot
from shardlaunch.sharding.resolve import STRATEGIES, check_quantized_base, check_settings
from shardlaunch.sharding.strategy import Settings
from shardlaunch.sharding.world import World

MOST_COMPARED = 8
MOST_QUOTED = 300


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is planned: a recipe with its data, and the options that decide memory."""

    recipe: Recipe
    data: RunData
    precision_name: str

    @property
    def options(self) -> Options:
        return self.recipe.options

    def settings(self) -> Settings:
        """Return the strategy's settings."""
        return settings_of(type(self.recipe), self.options, self.precision_name)

    def with_options(self, **changed: Any) -> "Subject":
        """Return the same with other options."""
        recipe = copy(self.recipe)
        recipe.options = copy(recipe.options)
        for name, value in changed.items():
            setattr(recipe.options, name, value)
        size = recipe.options.micro_batch_size
        return replace(
            self, recipe=recipe, data=replace(self.data, plan=replace(self.data.plan, micro_batch_size=size))
        )

    def largest_batch(self) -> tuple[MicroBatch, str]:
        """Return the micro-batch that takes the most memory, and how it was found."""
        plan, batches = self.data.plan, self.data.training_batches(self.recipe, World())

        def load(samples: np.ndarray) -> MicroBatch:
            return batches.load(Slot(step=0, epoch=0, micro_batch=0, weight=1, samples=samples))

        if plan.equal_work:
            steps = range(min(plan.steps_per_epoch, BUCKET_BATCHES))
            parts = [part for step in steps for part in zip(plan.work(step), pairwise(plan.bounds(step)), strict=True)]
            _, (first, end) = max(parts)
            return load(plan.between(0, first, end)), f"the most work of the first {len(steps)} steps"
        if plan.lengths is not None:
            longest = np.argsort(plan.lengths, kind="stable")[-plan.micro_batch_size :]
            return load(longest), f"the {len(longest)} longest samples"
        firsts = range(0, min(plan.num_samples, MOST_COMPARED * plan.micro_batch_size), plan.micro_batch_size)
        loaded = [load(plan.micro_batch(0, first)) for first in firsts]
        return max(loaded, key=_num_bytes), f"the largest of the first {len(loaded)} micro-batches"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs under one strategy. Bytes are those of one rank."""

    strategy: str
    problem: str = ""
    """Why there is no such run; all else is then empty."""
    memory: Memory | None = None
    fits: bool = False
    details: str = ""
    wire_bytes: int = 0
    """Sent by one rank in one step."""
    step_s: float = 0.0
    save_bytes: int = 0
    """Of one checkpoint."""
    save_s: float = 0.0
    host_bytes: int = 0
    """Of one machine: shards that are offloaded, and the copy of a save that is written beside the training."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Options that differ from those given."""


def plan_strategy(subject: Subject, cluster: Cluster, name: str, micro_batch: MicroBatch, **changes: Any) -> Plan:
    """Return the plan of one strategy, with its problem if the run would be refused.

    Raises UserError where the model cannot be run without values.
    """
    settings, options = subject.settings(), subject.options
    least = STRATEGIES[name].least_ranks
    if 1 < cluster.ranks < least:
        return Plan(strategy=name, problem=f"needs at least {least} ranks")
    try:
        STRATEGIES[name].check_available()
        check_settings(name, settings)
        if options.lora_base_bits:
            check_quantized_base(name)
        with catch_warnings():
            simplefilter("ignore")  # the run has them too
            trace = simulate(
                copy(subject.recipe),
                subject.data,
                micro_batch,
                strategy_name=name,
                settings=settings,
                precision_name=subject.precision_name,
                ranks=cluster.ranks,
                ranks_per_node=cluster.ranks_per_node,
            )
    except UserError as error:
        return Plan(strategy=name, problem=str(error).removeprefix(f"{name}: "))
    except Exception as error:
        raise UserError(_untraceable(error)) from error
    slots = -(-options.micro_batches // cluster.ranks)
    memory = memory_of(trace, is_offloaded=settings.cpu_offload)
    collectives = Counter(trace.per_step(slots))
    stays = memory.parameters + memory.gradients + memory.optimizer
    on_host = memory.host
    copied = 0 if options.async_save == "off" else -(-trace.state_bytes // cluster.ranks)
    return Plan(
        strategy=name,
        memory=memory,
        fits=cluster.fits(memory.peak),
        details=trace.details,
        wire_bytes=round(sum(count * wire_bytes(one) for one, count in collectives.items())),
        step_s=step_time_s(
            cluster,
            collectives,
            flops=trace.flops_per_step(slots),
            slots=slots,
            precision_name=subject.precision_name,
            is_gathered=STRATEGIES[name].gathers_weights,
            device_bytes=stays - on_host,
            host_bytes=on_host,
        ),
        save_bytes=trace.state_bytes,
        save_s=trace.state_bytes / (cluster.disk_gbps * 1e9),
        host_bytes=cluster.ranks_per_node * (on_host + copied),
        changes=changes,
    )


def fastest(plans: Sequence[Plan]) -> Plan | None:
    """Return the fastest plan that fits; of equally fast ones, the one that needs the least memory."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: (plan.step_s, plan.memory.peak if plan.memory else 0), default=None)


def suggest(subject: Subject, cluster: Cluster, plans: Sequence[Plan], *, say: Callable[[str], None]) -> Plan | None:
    """Return the first plan that fits with other options, for the strategy that needs the least; None if none does."""
    candidates = [plan for plan in plans if plan.memory is not None]
    if not candidates:
        return None
    name = min(candidates, key=lambda plan: plan.memory.peak if plan.memory else 0).strategy
    always: dict[str, Any] = {}

    def tried(changes: dict[str, Any]) -> Plan:
        say(f"trying {name} with {option_words(changes)}")
        changed = subject.with_options(**changes)
        return plan_strategy(changed, cluster, name, changed.largest_batch()[0], **changes)

    if not subject.options.gradient_checkpointing:
        plan = tried({"gradient_checkpointing": True})
        if plan.fits:
            return plan
        if plan.memory is not None:  # the model has it
            always["gradient_checkpointing"] = True
    for changes in _smaller(subject.options, name):
        plan = tried(always | changes)
        if plan.fits:
            return plan
    return None


def _smaller(options: Options, name: str) -> Iterator[dict[str, Any]]:
    """Yield options that need less memory, the least costly first."""
    smaller: dict[str, Any] = {}
    for size in sorted({max(1, options.micro_batch_size // 4), 1}, reverse=True):
        if size < options.micro_batch_size and options.global_batch_size % size == 0:
            smaller = {"micro_batch_size": size}
            yield smaller
    if STRATEGIES[name].is_sharded and not options.cpu_offload:
        yield smaller | {"cpu_offload": True}


def option_words(changes: dict[str, Any]) -> str:
    """Return options as words of the command line."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def _num_bytes(micro_batch: MicroBatch) -> int:
    tensors = (leaf for leaf in tree_leaves(micro_batch.inputs) if isinstance(leaf, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _untraceable(error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0][:MOST_QUOTED]
    if not isinstance(error, CannotPlan):
        reason = f"{type(error).__name__}: {reason}"
    return (
        f"plan: the model cannot be run on tensors without values: {reason}. Nothing is planned. Models whose shapes "
        f"or branches depend on what they compute (a mixture of experts, for one) cannot be planned"
    )

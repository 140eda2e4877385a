"""Two steps of a run on tensors without values: the recipe's model, the project's own strategy and trainer.

One process stands for rank 0 of any number of ranks, whose collectives a fake process group leaves undone.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.launcher.optimization.freezing import freeze, train_mode
from shardlaunch.launcher.planning.allocator import BLOCK_BYTES
from shardlaunch.launcher.planning.gpu_kernels import gpu_kernels
from shardlaunch.launcher.planning.ledger import Collective, Ledger
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.runs.assembly import enable_gradient_checkpointing, recipe_optimizer
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.runs.lora import add_adapters
from shardlaunch.launcher.runs.model import build_empty_model, origins_of
from shardlaunch.launcher.training.batches import GlobalBatch, MicroBatch
from shardlaunch.launcher.training.step_sums import CountedBatch
from shardlaunch.launcher.training.trainer import Hooks, Trainer
from shardlaunch.sharding.fsdp2 import Fsdp2, Hsdp
from shardlaunch.sharding.precision import apply_precision
from shardlaunch.sharding.resolve import STRATEGIES
from shardlaunch.sharding.strategy import Settings, Strategy
from shardlaunch.sharding.world import World
from shardlaunch.sharding.zero import Zero
from shardlaunch.sharding.zero_planned import views_of_rank_0

PARAMETERS, GRADIENTS, OPTIMIZER, INPUTS = "parameters", "gradients", "optimizer", "inputs"


class _CutOnMeta:
    """FSDP2 whose parameters are cut on the meta device, outside of the ledger: for thousands of ranks, in seconds."""

    def _mesh(self, world: World, settings: Settings) -> Any:
        with _disable_current_modes():
            return super()._mesh(world, settings)  # type: ignore[misc]

    def _wrap(self, model: nn.Module, mesh: Any, settings: Settings) -> None:
        with _disable_current_modes(), cheap_chunks():
            super()._wrap(model, mesh, settings)  # type: ignore[misc]


class _Fsdp2(_CutOnMeta, Fsdp2):
    pass


class _Hsdp(_CutOnMeta, Hsdp):
    pass


_CUT: dict[type[Strategy], type[Strategy]] = {Fsdp2: _Fsdp2, Hsdp: _Hsdp}
SIMULATED = {name: _CUT.get(strategy, strategy) for name, strategy in STRATEGIES.items()}


class Mark(NamedTuple):
    """The number of events before a moment of a step."""

    position: int
    name: str


class StepCounts(NamedTuple):
    """What a step computes and sends."""

    num_slots: int
    flops: int
    collectives: dict[Collective, int]


@dataclass(kw_only=True)
class Trace:
    """What two steps of one rank took."""

    events: list[tuple[int, int]]
    kinds: dict[int, str] = field(default_factory=dict)
    """What a storage holds, of those that stay from step to step."""
    streams: dict[int, int] = field(default_factory=dict)
    """The stream of a storage that is not allocated in the default one."""
    marks: list[Mark] = field(default_factory=list)
    steps: list["StepCounts"] = field(default_factory=list)
    state_bytes: int = 0
    """What a checkpoint holds."""
    details: str = ""

    def flops_per_step(self, slots: int) -> int:
        """Return the floating-point operations of a step of so many micro-batches."""
        return self._per_step([step.flops for step in self.steps], slots)

    def per_step(self, slots: int) -> dict[Collective, int]:
        """Return how often a step of so many micro-batches calls each collective."""
        known = {one for step in self.steps for one in step.collectives}
        return {one: self._per_step([step.collectives.get(one, 0) for step in self.steps], slots) for one in known}

    def _per_step(self, counts: list[int], slots: int) -> int:
        """Return the count of a step by those of steps with fewer micro-batches: each more adds the same."""
        if self.steps[-1].num_slots == 1:
            return counts[-1]
        return counts[0] + (slots - 1) * (counts[-1] - counts[0])


def simulate(
    recipe: Recipe,
    data: RunData,
    micro_batch: MicroBatch,
    *,
    strategy_name: str,
    settings: Settings,
    precision_name: str,
    ranks: int,
    ranks_per_node: int,
    on_gpu: bool = True,
) -> Trace:
    """Run a step of one micro-batch and a step of two, where a rank has two, and return their trace.

    `on_gpu`: count what the kernels of a GPU keep, not those of the CPU. Raises UserError for what the run refuses.
    """
    options = copy(recipe.options)
    options.digest_every = 0  # digests are of values
    num_slots = min(2, -(-options.micro_batches // ranks))
    precision = apply_precision("bf16" if precision_name == "fp8" else precision_name, torch.device("cpu"))
    model = build_empty_model(recipe, options.seed)
    if options.lora_rank:
        new = [] if options.init_from else origins_of(model, recipe.weights(), ()).new
        adapters, _ = add_adapters(model, options, new=new, is_empty=True)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model, every=options.gradient_checkpointing_every)
    freeze(model, options, step=0)
    ledger = Ledger()

    def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return recipe_optimizer(recipe, list(parameters))

    strategy_type = SIMULATED[strategy_name]
    with _ranks(ranks, ranks_per_node) as world, _usual_linear():
        kernels = gpu_kernels() if on_gpu else nullcontext()
        is_zero = issubclass(strategy_type, Zero)
        views = views_of_rank_0(world, block_bytes=BLOCK_BYTES) if is_zero else nullcontext()
        with views, kernels, ledger.noting():
            _take_values(model, ledger, keeps_parameters=issubclass(strategy_type, Fsdp2))
            strategy = strategy_type(model, build_optimizer, world=world, settings=settings)
            if options.keeps_average:
                strategy.keep_average(is_exact=options.exact)
            trace = Trace(events=ledger.events, streams=ledger.streams, details=strategy.describe())
            _note_kinds(trace, ledger, strategy)
            trainer = Trainer(
                recipe,
                options,
                strategy,
                data.training_batches(recipe, world),
                None,
                world=world,
                precision=precision,
                num_steps=data.num_steps,
                hooks=Hooks(
                    on_step=_ignore, on_left_out=_ignore, on_evaluating=_ignore, on_evaluation=_ignore, save=_ignore
                ),
                has_values=False,
            )
            _run_steps(trainer, trace, ledger, micro_batch, most_slots=num_slots)
            saved = [fragment.spec for fragment in strategy.state()]
            if options.lora_rank:
                saved = [spec for spec in saved if spec.name in adapters.saved_names]
            trace.state_bytes = sum(spec.num_bytes for spec in saved) + trainer.averaging.bytes_to_come(saved)
            trace.events = list(ledger.events)
    return trace


def _ignore(*_: object) -> None:
    pass


def _run_steps(trainer: Trainer, trace: Trace, ledger: Ledger, micro_batch: MicroBatch, *, most_slots: int) -> None:
    strategy = trainer.strategy
    backward, finish, update = strategy.backward, strategy.finish_gradients, strategy.optimizer_step

    def mark(name: str) -> None:
        trace.marks.append(Mark(len(ledger.events), name))

    def marked_backward(loss: torch.Tensor, *, factor: float, last: bool) -> None:
        mark("forward")
        backward(loss, factor=factor, last=last)
        mark("backward")

    def marked_finish(*, unscale: float, max_norm: float) -> float:
        norm = finish(unscale=unscale, max_norm=max_norm)
        _note_kinds(trace, ledger, strategy, has_gradients=True)
        mark("gradients")
        return norm

    def marked_update() -> None:
        update()
        _note_kinds(trace, ledger, strategy)
        mark("update")

    vars(strategy).update(backward=marked_backward, finish_gradients=marked_finish, optimizer_step=marked_update)
    for model in strategy.replicas:
        train_mode(model)
    mark("begin")
    inputs = _without_values(micro_batch.inputs, ledger, trace)
    for num_slots in (1, most_slots):
        batch = GlobalBatch(
            step=0,
            num_samples=1,
            num_micro_batches=num_slots,
            micro_batches=[replace(micro_batch, inputs=inputs, index=number) for number in range(num_slots)],
        )
        ledger.flops = 0
        ledger.collectives.clear()
        counted = CountedBatch(batch, micro_batch.num_targets, micro_batch.num_tokens)
        trainer.train_step(counted, iter(()), time.perf_counter())
        trace.steps.append(StepCounts(num_slots, ledger.flops, dict(ledger.collectives)))
    for name in ("backward", "finish_gradients", "optimizer_step"):
        del vars(strategy)[name]


def _without_values(inputs: Any, ledger: Ledger, trace: Trace) -> Any:
    """Return a batch whose floats have no values."""

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        taken = ledger.fake(tensor) if tensor.dtype.is_floating_point else tensor
        trace.kinds[ledger.number_of(taken)] = INPUTS
        return taken

    return tree_map_only(torch.Tensor, noted, inputs)


def _note_kinds(trace: Trace, ledger: Ledger, strategy: Strategy, *, has_gradients: bool = False) -> None:
    """Note which storages hold what stays from step to step."""
    with torch.no_grad():
        for model in strategy.replicas:
            for tensor in (*model.parameters(), *model.buffers()):
                held = getattr(tensor, "ds_tensor", tensor)  # ZeRO 3's shard, of which no master is kept if frozen
                if not held.is_meta:
                    trace.kinds[ledger.number_of(held)] = PARAMETERS
            for parameter in model.parameters():
                if parameter.grad is not None:
                    trace.kinds[ledger.number_of(parameter.grad)] = GRADIENTS
        if isinstance(strategy, Zero):
            for master in strategy.partitions.masters:
                trace.kinds[ledger.number_of(master)] = PARAMETERS
            for gradient in strategy.partitions.gradients() if has_gradients else ():
                trace.kinds[ledger.number_of(gradient)] = GRADIENTS
        for value in strategy.average.tensors if strategy.average is not None else ():
            trace.kinds[ledger.number_of(value)] = OPTIMIZER
        for state in strategy.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    trace.kinds[ledger.number_of(value)] = OPTIMIZER


def _take_values(model: nn.Module, ledger: Ledger, *, keeps_parameters: bool) -> None:
    """Replace floats by tensors without values, on the CPU: buffers, and parameters unless the strategy places them."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype.is_floating_point:
                module._buffers[name] = made.setdefault(id(buffer), ledger.fake(buffer))
        for name, parameter in module._parameters.items():
            if parameter is not None and not keeps_parameters:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(ledger.fake(parameter), requires_grad=parameter.requires_grad)
                    made[id(parameter)].__dict__.update(parameter.__dict__)
                module._parameters[name] = made[id(parameter)]
    if not keeps_parameters:
        vars(model)["to"] = lambda *_: model  # it is where it belongs, and torch cannot move tensors without values


@contextmanager
def _ranks(ranks: int, ranks_per_node: int) -> Iterator[World]:
    """Yield rank 0 of so many, in this process alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        world = World(
            size=ranks,
            local_ranks=range(min(ranks, ranks_per_node)),
            host_group=dist.new_group(backend="fake"),
            host_backend="fake",
        )
        vars(world)["peers"] = Peers()  # what the others would say is not known, and not needed
        yield world
    finally:
        dist.destroy_process_group()


@contextmanager
def _usual_linear() -> Iterator[None]:
    """Put torch's linear function back, which DeepSpeed replaces for good: the next plan may be of another strategy."""
    usual = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = usual


@contextmanager
def cheap_chunks() -> Iterator[None]:
    """Let ranks without a piece of a parameter share one empty tensor: torch makes one for each of thousands."""
    usual = _fsdp_param._chunk_with_empty

    def chunks(tensor: torch.Tensor, num_chunks: int, dim: int) -> list[torch.Tensor]:
        found = list(torch.chunk(tensor, num_chunks, dim=dim))
        return found + [found[0].new_empty(0)] * (num_chunks - len(found)) if len(found) < num_chunks else found

    _fsdp_param._chunk_with_empty = chunks
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = usual

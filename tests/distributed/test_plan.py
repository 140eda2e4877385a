"""Peaks of planned memory beside what the CPU's allocator counts in real runs."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData
from shardlaunch.launcher.planning import simulation
from shardlaunch.launcher.planning.allocator import in_blocks
from shardlaunch.launcher.planning.memory import Memory, memory_of
from shardlaunch.launcher.planning.simulation import Trace, simulate
from shardlaunch.launcher.runs.assembly import assemble
from shardlaunch.launcher.runs.data import RunData, load_data
from shardlaunch.launcher.training.batches import GlobalBatch, MicroBatch, Slot
from shardlaunch.launcher.training.trainer import CountedBatch, Hooks, Trainer
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.precision import PRECISIONS, apply_precision
from shardlaunch.sharding.strategy import Settings
from shardlaunch.sharding.world import World, connect, disconnect
from shardlaunch.sharding.zero_planned import _padding
from tests.distributed.ranks import run_on_ranks

WIDTH, VOCABULARY, LENGTH = 192, 1000, 40


class Block(nn.Module):
    """A part that is gathered at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.dropout(self.down(F.gelu(self.up(self.norm(inputs)))))


class Deep(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(5)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.blocks(self.embedding(inputs)))
        return logits.clone()  # FSDP2 warns of views


class Language(Deep):
    """With the names that Hugging Face's models have."""

    _no_split_modules = ("Block",)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class DeepRecipe(Recipe):
    """Predicts numbers."""

    options: Options
    layer_classes = ("Block",)

    def datasets(self) -> dict[str, Any]:
        samples = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=samples, labels=samples)}

    def model(self) -> nn.Module:
        return Deep()

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def _subject() -> tuple[DeepRecipe, RunData, MicroBatch]:
    recipe = DeepRecipe(
        Options(global_batch_size=16, micro_batch_size=4, max_grad_norm=1.0, threads_per_rank=1, ema=0.9)
    )
    data = load_data(recipe, World(), None)
    batches = data.training_batches(recipe, World())
    return recipe, data, batches.load(Slot(0, 0, 0, 1, data.plan.micro_batch(0, 0)))


def _settings(precision: str) -> Settings:
    return Settings(compute_dtype=PRECISIONS[precision], layer_classes=DeepRecipe.layer_classes)


def _planned(strategy: str, precision: str, ranks: int) -> tuple[Memory, int]:
    """Return planned memory, and the bytes that are there before the first step."""
    trace = _trace(strategy, precision, ranks)
    return memory_of(trace), sum(change for _, change in trace.events[: trace.marks[0].position])


def _trace(strategy: str, precision: str, ranks: int, **settings: Any) -> Trace:
    torch.set_num_threads(1)
    return simulate(
        *_subject(),
        strategy_name=strategy,
        settings=replace(_settings(precision), **settings),
        precision_name=precision,
        ranks=ranks,
        ranks_per_node=8,
        on_gpu=False,
    )


def _planned_with_ends_on_their_own() -> list[tuple[Memory, int]]:
    """Return memory, and the bytes of all collectives, of a model with large ends and of one whose ends are unknown."""
    found = []
    for model in (Language, Deep):
        with patch.object(DeepRecipe, "model", lambda _, model=model: model()):
            trace = _trace("fsdp2", "bf16", 8)
        num_bytes = sum(one.num_bytes * count for one, count in trace.per_step(1).items())
        found.append((memory_of(trace), num_bytes))
    return found


def _planned_with_all_views(cases: list[tuple[str, int, bool]]) -> list[tuple[Any, Any]]:
    """Return what plans by DeepSpeed's own loops over ranks say, and plans without them."""

    def planned(strategy: str, ranks: int, is_offloaded: bool) -> Any:
        trace = _trace(strategy, "bf16", ranks, cpu_offload=is_offloaded)
        allocated = sum(in_blocks(change) for _, change in trace.events if change > 0)
        return memory_of(trace, is_offloaded=is_offloaded), allocated, trace.steps, trace.state_bytes

    found = []
    for case in cases:
        with patch.object(simulation, "views_of_rank_0", lambda *_, **__: nullcontext()):
            slow = planned(*case)
        found.append((slow, planned(*case)))
    return found


class _Done:
    """A collective that has ended."""

    def wait(self, *_: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _gather(whole: torch.Tensor, shard: torch.Tensor, *_: Any, **__: Any) -> _Done:
    """Gather as if all ranks had the same: threads of gloo would hold memory for a time that no two runs share."""
    for part in whole.chunk(dist.get_world_size()):
        if part.data_ptr() != shard.data_ptr():
            part.copy_(shard)
    return _Done()


def _reduce_scatter(shard: torch.Tensor, whole: torch.Tensor, *_: Any, **__: Any) -> _Done:
    shard.copy_(whole.chunk(dist.get_world_size())[dist.get_rank()])
    return _Done()


def _nop(*_: object) -> None:
    pass


def _allocated(strategy: str, precision: str) -> tuple[int, int]:
    """Return the peak of the allocator in two steps of a real run, and its bytes before the first step."""
    torch.set_num_threads(1)
    dist.all_gather_single = lambda output, input, **_: _gather(output, input)
    dist.reduce_scatter_single = lambda output, input, **_: _reduce_scatter(output, input)
    world = connect(read_environment(), needs_group=True)
    recipe, data, micro_batch = _subject()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assembly = assemble(
            recipe,
            world=world,
            strategy_name=strategy,
            settings=_settings(precision),
            precision_name=precision,
            run_digest=0,
            step=0,
            is_resumed=False,
        )
        trainer = Trainer(
            recipe,
            recipe.options,
            assembly.strategy,
            data.training_batches(recipe, world),
            None,
            world=world,
            precision=apply_precision(precision, world.device),
            num_steps=data.num_steps,
            hooks=Hooks(on_step=_nop, on_left_out=_nop, on_evaluating=_nop, on_evaluation=_nop, save=_nop),
        )
        with torch.profiler.record_function("steps begin"):
            pass
        for num_slots in (1, min(2, 4 // world.size)):
            micro_batches = [replace(micro_batch, index=number) for number in range(num_slots)]
            batch = GlobalBatch(step=0, num_samples=4, num_micro_batches=num_slots, micro_batches=micro_batches)
            trainer.train_step(CountedBatch(batch, 4 * LENGTH, 0), iter(()), 0.0)
    disconnect(world)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (begin,) = [number for number, event in enumerate(events) if event.name() == "steps begin"]
    live = np.cumsum([event.nbytes() if event.name() == "[memory]" else 0 for event in events])
    return int(live[begin:].max()), int(live[begin])


@pytest.mark.parametrize(
    ("strategy", "precision", "ranks"),
    [("single", "fp32", 1), ("ddp", "bf16", 2), ("fsdp2", "bf16", 2)],
)
def test_plan_is_what_a_real_run_allocates(strategy: str, precision: str, ranks: int) -> None:
    ((planned, planned_begin),) = run_on_ranks(1, _planned, strategy, precision, ranks)
    for peak, begin in run_on_ranks(ranks, _allocated, strategy, precision):
        # The rank that makes the initial values holds some of them too, in what is the host's memory on GPUs.
        assert planned_begin <= 1.01 * begin
        assert planned.peak - planned_begin == pytest.approx(peak - begin, rel=0.01)
        if ranks == 1:
            assert planned.peak == pytest.approx(peak, rel=0.01)


def test_plan_for_thousands_of_ranks() -> None:
    ((few, _),) = run_on_ranks(1, _planned, "fsdp2", "fp32", 2)
    ((many, _),) = run_on_ranks(1, _planned, "fsdp2", "fp32", 16_384)
    num_tensors = 2 + 6 * 5
    assert few.parameters > 2_000_000
    assert few.optimizer == pytest.approx(3 * few.parameters, rel=0.01)  # two values of AdamW, and the average
    assert many.parameters < 1024 * num_tensors  # at most a row of each, in blocks
    assert many.activations == pytest.approx(few.activations, rel=0.01)


def test_plans_of_zero_are_those_of_deepspeeds_own_loops() -> None:
    cases = [("zero1", 20, False), ("zero2", 7, True), ("zero3", 7, False)]  # which divide nothing evenly
    (found,) = run_on_ranks(1, _planned_with_all_views, cases)
    for case, (slow, fast) in zip(cases, found, strict=True):
        assert slow == fast, case


@pytest.mark.parametrize(("num_elements", "num_ranks"), [(192, 7), (192, 300), (8, 4), (3, 4), (1, 600), (5000, 3)])
def test_padding_is_that_of_each_rank(num_elements: int, num_ranks: int) -> None:
    tensor = torch.empty(num_elements)
    size = -(-num_elements // num_ranks)
    padding = [size - len(tensor[rank * size : (rank + 1) * size]) for rank in range(num_ranks)]
    num_bytes = _padding(tensor, size, num_ranks, 512).nbytes
    assert num_bytes == sum(-(-4 * length // 512) * 512 for length in padding)


def test_large_ends_that_are_gathered_on_their_own_take_less() -> None:
    (((memory, num_bytes), (with_the_rest, more_bytes)),) = run_on_ranks(1, _planned_with_ends_on_their_own)
    head_bytes = WIDTH * VOCABULARY * 4
    assert memory.activations < with_the_rest.activations - head_bytes / 3  # no copy of the head for autocast
    assert memory.peak < with_the_rest.peak
    assert num_bytes < more_bytes - head_bytes / 2  # gathered in bf16
    assert memory.parameters == with_the_rest.parameters

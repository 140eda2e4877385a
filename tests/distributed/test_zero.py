"""ZeRO stages against plain training in one process."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch.checkpoints.state import Fragment
from shardlaunch.launcher.optimization.optimizers import decay_groups
from shardlaunch.sharding import zero as zero_module
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.replicated import Replicated
from shardlaunch.sharding.strategy import BuildOptimizer, Settings, Strategy
from shardlaunch.sharding.world import World, connect, disconnect
from tests.distributed.ranks import run_on_ranks
from tests.distributed.zero_net import STAGES, Reader, State, adamw, initial_state, make_net

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason='needs pip install "shardlaunch[deepspeed]"')

OTHER = ["zero2", "zero3", "zero1"]
MICRO_BATCHES = [4, 3, 5, 1, 4, 6, 2, 4]  # of each step
BOUND = 1e-6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which steps to run, from which state, and how."""

    first: int = 0
    last: int = len(MICRO_BATCHES)
    start: State | None = None
    rare: str = "never"  # which micro-batches use the parameter `rare`: see `micro_batch_loss`
    max_norm: float = 1.0
    scale: float = 1.0
    discard: int = -1  # the step that is tried once before with a loss scale that overflows
    evaluate: bool = False
    bucket_elements: int = zero_module.BUCKET_ELEMENTS
    persistent_elements: int = zero_module.PERSISTENT_ELEMENTS
    cpu_offload: bool = False
    build_optimizer: BuildOptimizer = adamw


def train(strategy: Strategy, world: World, plan: Plan) -> list[float]:
    """Run steps as the trainer does: rank r has micro-batches r, r + num_ranks, ... and empty slots at the end."""
    norms = []
    for step in range(plan.first, plan.last):
        for attempt in range(2 if step == plan.discard else 1):
            is_discarded = step == plan.discard and attempt == 0
            scale = 1e38 if is_discarded else plan.scale
            count = MICRO_BATCHES[step]
            rounds = -(-count // world.size)
            for slot in range(rounds):
                index = slot * world.size + world.rank
                loss = micro_batch_loss(strategy.replicas[0], step, min(index, count - 1), plan.rare)
                factor = scale / count / 6 * (index < count)
                strategy.backward(loss, factor=factor, last=slot == rounds - 1)
            norm = strategy.finish_gradients(unscale=1 / scale, max_norm=plan.max_norm)
            for group in strategy.optimizer.param_groups:
                group["lr"] = 0.01 * (1 - step / 16)
            if is_discarded:
                assert not math.isfinite(norm)
                strategy.discard()
            else:
                norms.append(norm)
                strategy.optimizer_step()
        if plan.evaluate:
            strategy.replicas[0].eval()
            with torch.no_grad():
                micro_batch_loss(strategy.replicas[0], 100, 0, plan.rare)
            strategy.replicas[0].train()
    return norms


def micro_batch_loss(model: nn.Module, step: int, index: int, rare: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(11, (2, 4), generator=generator)
    uses_rare = {"never": False, "always": True, "odd": index % 2 == 1, "first": step % 2 == 1 and index < 2}[rare]
    logits = model(tokens, rare=uses_rare)
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1), reduction="sum")


def plain(plan: Plan) -> "Run":
    """Train in this process."""
    strategy = Replicated(make_net(), plan.build_optimizer, world=World())
    strategy.restore(Reader(plan.start or initial_state()))
    norms = train(strategy, World(), plan)
    return norms, {(f.spec.name, f.spec.entry): f.tensor.clone().reshape(f.spec.shape) for f in strategy.state()}


# (name, entry, shape, start, end, elements); numpy arrays, since a tensor would be a handle into a rank's memory
Shards = list[tuple[str, str, tuple[int, ...], int, int, Any]]
Run = tuple[list[float], State]  # norms by step, and the state after the last


def _shards(fragments: Iterable[Fragment]) -> Shards:
    return [
        (f.spec.name, f.spec.entry, f.spec.shape, f.flat_start, f.flat_end, f.tensor.cpu().reshape(-1).numpy().copy())
        for f in fragments
    ]


def _on_rank(cases: Sequence[tuple[str, Plan, dict[Any, Any]]]) -> list[tuple[list[float], Shards, Any]]:
    torch.set_num_threads(1)
    world = connect(read_environment(os.environ))
    results = []
    for stage, plan, start in cases:
        zero_module.BUCKET_ELEMENTS = plan.bucket_elements
        zero_module.PERSISTENT_ELEMENTS = plan.persistent_elements
        kind = STAGES[stage]
        net = make_net("meta" if kind.starts_empty else "cpu")
        strategy = kind(net, plan.build_optimizer, world=world, settings=Settings(cpu_offload=plan.cpu_offload))
        reader = Reader({key: torch.from_numpy(array) for key, array in start.items()} or initial_state())
        strategy.restore(reader)
        results.append((train(strategy, world, plan), _shards(strategy.state()), reader.asked))
    disconnect(world)
    return results


def zero(num_ranks: int, cases: Sequence[tuple[str, Plan]]) -> list[Run]:
    """Train each case from its start, all on the same ranks."""
    runs = []
    sent = [
        (stage, replace(plan, start=None), {key: tensor.numpy() for key, tensor in (plan.start or {}).items()})
        for stage, plan in cases
    ]
    for results in zip(*run_on_ranks(num_ranks, _on_rank, sent), strict=True):
        norms, shards, asked = zip(*results, strict=True)
        assert all(each == norms[0] for each in norms)
        assert all(each == asked[0] for each in asked)
        runs.append((norms[0], assembled(shards)))
    return runs


def assembled(by_rank: Sequence[Shards]) -> State:
    """Join the ranks' shards; every element must be present, and equal wherever it is present twice."""
    state: State = {}
    for same in zip(*by_rank, strict=True):
        name, entry, shape, *_ = same[0]
        assert all(shard[:3] == (name, entry, shape) for shard in same)
        assert (name, entry) not in state
        flat = torch.full((torch.Size(shape).numel(),), float("nan"))
        for _, _, _, start, end, array in same:
            elements, known = torch.from_numpy(array), flat[start:end]
            assert elements.numel() == end - start
            assert torch.equal(torch.where(known.isnan(), elements, known), elements), (name, entry)
            flat[start:end] = elements
        assert not flat.isnan().any(), (name, entry)
        state[name, entry] = flat.reshape(shape)
    return state


def difference(found: State, expected: State) -> float:
    assert list(found) == list(expected)
    return max((found[key] - expected[key]).abs().max().item() for key in expected)


def assert_same_run(found: Run, expected: Run, bound: float = BOUND) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert difference(found[1], expected[1]) <= bound


HARD = Plan(rare="odd", bucket_elements=60, persistent_elements=0, evaluate=True, discard=3, scale=1024.0)
"""Small buckets and no persistent parameters; a parameter that not all ranks reach; a step that overflows first."""


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_steps_are_those_of_one_process(num_ranks: int) -> None:
    plans = [Plan(), HARD, Plan(rare="first", max_norm=0.0)]
    expected = [plain(plan) for plan in plans]
    cases = [(stage, plan) for stage in STAGES for plan in plans]
    for case, run in enumerate(zero(num_ranks, cases)):
        assert_same_run(run, expected[case % len(plans)])


def test_resume_with_the_same_ranks_is_the_same_bit_for_bit() -> None:
    runs = zero(3, [(stage, plan) for stage in STAGES for plan in (HARD, replace(HARD, last=4))])
    whole, begun = runs[::2], runs[1::2]
    resumed = zero(3, [(stage, replace(HARD, first=4, start=run[1])) for stage, run in zip(STAGES, begun, strict=True)])
    for one, other in zip(whole, resumed, strict=True):
        assert one[0][4:] == other[0]
        assert difference(one[1], other[1]) == 0


def test_resume_with_other_ranks_and_another_stage() -> None:
    plan = Plan(rare="always")
    expected = plain(plan)
    begun = zero(2, [(stage, replace(plan, last=3)) for stage in ("zero1", "zero2", "zero3")])
    starts = [(stage, replace(plan, first=3, last=6, start=run[1])) for stage, run in zip(OTHER, begun, strict=True)]
    for first, second in zip(begun, zero(3, starts), strict=True):
        third = plain(replace(plan, first=6, start=second[1]))
        assert_same_run((first[0] + second[0] + third[0], third[1]), expected, bound=1e-5)


def optimizer_of(kind: Any, parameters: Iterable[tuple[str, nn.Parameter]], **options: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind(decay_groups(parameters, 0.1), lr=0.01, **options)
    return optimizer


OPTIMIZERS = [
    partial(optimizer_of, torch.optim.SGD),
    partial(optimizer_of, torch.optim.SGD, momentum=0.9, nesterov=True),
    partial(optimizer_of, torch.optim.Adam, amsgrad=True),
    partial(optimizer_of, torch.optim.AdamW, foreach=False, maximize=True),
    partial(optimizer_of, torch.optim.AdamW, fused=True),
    partial(optimizer_of, torch.optim.Adamax),
    partial(optimizer_of, torch.optim.NAdam),
    partial(optimizer_of, torch.optim.RAdam),
    partial(optimizer_of, torch.optim.RMSprop, momentum=0.9, eps=1e-3),
    partial(optimizer_of, torch.optim.Adadelta),
]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_optimizers(stage: str) -> None:
    plans = [Plan(last=2, build_optimizer=build) for build in OPTIMIZERS]
    begun = zero(2, [(stage, plan) for plan in plans])
    ends = [replace(plan, first=2, last=4, start=run[1]) for plan, run in zip(plans, begun, strict=True)]
    for plan, first, second in zip(plans, begun, zero(2, [(stage, end) for end in ends]), strict=True):
        assert_same_run((first[0] + second[0], second[1]), plain(replace(plan, last=4)), bound=1e-5)


@pytest.mark.parametrize("plan", [Plan(), HARD])
def test_offloaded_to_the_host(plan: Plan) -> None:
    expected = plain(plan)
    for run in zero(2, [(stage, replace(plan, cpu_offload=True)) for stage in STAGES]):
        assert_same_run(run, expected)

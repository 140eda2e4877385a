"""ZeRO stages against plain training in one process."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import UserError
from shardlaunch.checkpoints.state import MODEL, OPTIMIZER, Fragment, TensorSpec
from shardlaunch.launcher.optimization.optimizers import decay_groups
from shardlaunch.sharding import zero as zero_module
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.replicated import Replicated
from shardlaunch.sharding.strategy import BuildOptimizer, Settings, Strategy
from shardlaunch.sharding.world import World, connect, disconnect
from shardlaunch.sharding.zero import Zero, Zero1, Zero2, Zero3
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason='needs pip install "shardlaunch[deepspeed]"')

STAGES: dict[str, type[Zero]] = {"zero1": Zero1, "zero2": Zero2, "zero3": Zero3}
OTHER = ["zero2", "zero3", "zero1"]
MICRO_BATCHES = [4, 3, 5, 1, 4, 6, 2, 4]  # of each step
BOUND = 1e-6

State = dict[tuple[str, str], torch.Tensor]  # whole tensors by (name, entry); of weights the entry is empty


class Net(nn.Module):
    """Odd sizes, tied weights, a frozen parameter, one that nothing reaches, one that some batches reach, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.frozen = nn.Linear(7, 7)
        self.hidden = nn.Linear(7, 13)
        self.unreached = nn.Linear(5, 3)
        self.back = nn.Linear(13, 7)
        self.norm = nn.LayerNorm(7)
        self.rare = nn.Parameter(torch.ones(3, 1))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("factor", torch.tensor(0.5), persistent=False)

    def forward(self, tokens: torch.Tensor, *, rare: bool) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.frozen(hidden) * self.factor - self.mean
        hidden = self.norm(hidden + self.back(torch.tanh(self.hidden(hidden))))
        logits: torch.Tensor = self.head(hidden) * self.scale
        return logits * self.rare.prod() if rare else logits


def make_net(device: str = "cpu") -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.mean.uniform_(-0.1, 0.1)
    if device == "meta":
        for parameter in net.parameters():
            meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, meta)
    return net


def adamw(parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(parameters, 0.1), lr=0.01)


@dataclass
class Reader:
    """A state reader of tensors in memory that records its reads."""

    tensors: State
    asked: list[tuple[str, str]] = field(default_factory=list)

    def specs(self) -> Iterable[TensorSpec]:
        return [
            TensorSpec(
                name=name,
                section=OPTIMIZER if entry else MODEL,
                entry=entry,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
            )
            for (name, entry), tensor in self.tensors.items()
        ]

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int) -> torch.Tensor:
        self.asked.append((spec.name, spec.entry))
        return self.tensors[spec.name, spec.entry].reshape(-1)[flat_start:flat_end].clone()


def initial_state() -> State:
    net = make_net()
    tensors = [*net.named_parameters(), ("mean", net.mean)]
    return {(name, ""): tensor.detach().clone() for name, tensor in tensors}


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


class Choosy(nn.Module):
    """Use a module on rank 1 only, from the second micro-batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 4)
        self.sometimes = nn.Linear(4, 4)
        self.uses = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        hidden = self.always(inputs)
        if os.environ["RANK"] == "1" and self.uses > 1:
            hidden = self.sometimes(hidden)
        return hidden


def _choose(stage: str) -> tuple[list[float], str]:
    torch.set_num_threads(1)
    zero_module.PERSISTENT_ELEMENTS = 0
    torch.manual_seed(0)
    world = connect(read_environment(os.environ))
    with torch.device("meta" if STAGES[stage].starts_empty else "cpu"):
        model = Choosy()
    strategy = STAGES[stage](model, adamw, world=world)
    strategy.restore(Reader({(n, ""): torch.rand(p.shape) for n, p in Choosy().named_parameters()}))
    norms = []
    try:
        for _ in range(3):
            strategy.backward(model(torch.ones(2, 4)).square().sum(), factor=1.0, last=True)
            norms.append(strategy.finish_gradients(unscale=1.0, max_norm=0.0))
            strategy.optimizer_step()
    except UserError as error:
        return norms, str(error)
    except RuntimeError:
        return norms, "the other rank is gone"
    disconnect(world)
    return norms, ""


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_that_only_one_rank_uses(stage: str) -> None:
    """Stages 1 and 2 train correctly; stage 3, where running a module is a collective, raises an error."""
    (norms, error), (other_norms, other_error) = run_on_ranks(2, _choose, stage)
    if stage != "zero3":
        assert (error, other_error) == ("", "")
        assert norms == other_norms
        assert len(norms) == 3
    else:
        assert "do not run the same modules" in error + other_error
        assert error
        assert other_error
        assert len(norms) == len(other_norms) == 1


def _restore_odd() -> list[str]:
    world = connect(read_environment(os.environ))
    strategy = Zero2(make_net(), adamw, world=world)
    weights = initial_state()
    name = "hidden.weight"
    trained = [key for key, p in make_net().named_parameters() if p.requires_grad]
    steps = {(key, "step"): torch.tensor(3.0) for key in trained}
    errors = []
    for state in (
        steps | {(name, "step"): torch.tensor(4.0)},
        {key: value for key, value in steps.items() if key[0] != name},
        steps | {(name, "rows"): torch.ones(13)},
        steps | {("frozen.weight", "step"): torch.tensor(3.0)},
    ):
        with pytest.raises(UserError) as caught:
            strategy.restore(Reader(weights | state))
        errors.append(str(caught.value))
    disconnect(world)
    return errors


def test_state_that_does_not_fit_is_refused() -> None:
    errors, others = run_on_ranks(2, _restore_odd)
    assert errors == others
    for error, expected in zip(errors, ["'step' of hidden.weight", "not of hidden", "shape", "not train"], strict=True):
        assert expected in error


@pytest.mark.parametrize(
    ("build_optimizer", "complaint"),
    [
        (lambda named: torch.optim.Adagrad([p for _, p in named]), "Adagrad is not supported with ZeRO.*AdamW"),
        (lambda named: torch.optim.Adafactor([p for _, p in named]), "Adafactor.*fsdp2"),
        (lambda named: torch.optim.SGD([p for _, p in list(named)[1:]], lr=0.1), "rare is missing"),
        (lambda named: torch.optim.SGD([{"params": [p for _, p in named]}, {"params": []}], lr=0.1), "without param"),
    ],
)
def test_optimizers_that_cannot_be(build_optimizer: BuildOptimizer, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Zero2(make_net(), build_optimizer, world=World())


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"zero3 needs DeepSpeed.*shardlaunch\[deepspeed\]"):
        Zero3.check_available()

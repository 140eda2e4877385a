"""ZeRO stages against plain training in one process."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import UserError
from shardlaunch.checkpoints.state import WEIGHT, Fragment, StateReader, TensorSpec
from shardlaunch.launcher.optimizers import decay_groups
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.replicated import Replicated
from shardlaunch.sharding.strategy import Settings, Strategy
from shardlaunch.sharding.world import World, connect, disconnect
from shardlaunch.sharding.zero import Zero, Zero1, Zero2, Zero3
from tests.distributed.ranks import run_on_ranks

pytest.importorskip("deepspeed", reason="needs the deepspeed extra")

STAGES: dict[str, type[Zero]] = {"zero1": Zero1, "zero2": Zero2, "zero3": Zero3}
MICRO_BATCHES = [4, 3, 5, 1, 4, 6, 2, 4]  # of each step
BOUND = 1e-6

State = dict[tuple[str, str], torch.Tensor]  # whole tensors by (name, kind)


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
    """A state reader over tensors in memory; it notes what is asked for."""

    tensors: State
    asked: list[tuple[str, str]] = field(default_factory=list)

    def specs(self) -> Iterable[TensorSpec]:
        return [
            TensorSpec(name=name, kind=kind, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for (name, kind), tensor in self.tensors.items()
        ]

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int) -> torch.Tensor:
        self.asked.append((spec.name, spec.kind))
        return self.tensors[spec.name, spec.kind].reshape(-1)[flat_start:flat_end].clone()


def initial_state() -> State:
    net = make_net()
    tensors = [*net.named_parameters(), ("mean", net.mean)]
    return {(name, WEIGHT): tensor.detach().clone() for name, tensor in tensors}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which steps to run, from which state, and how."""

    first: int = 0
    last: int = len(MICRO_BATCHES)
    start: State | None = None
    rare: str = "never"  # which micro-batches use the parameter `rare`: never, always, odd, last_rank
    max_norm: float = 1.0
    scale: float = 1.0
    discard: int = -1  # the step that is tried once before, and dropped
    evaluate: bool = False
    cpu_offload: bool = False


def train(strategy: Strategy, world: World, plan: Plan) -> list[float]:
    """Run steps as the trainer does: rank r has micro-batches r, r + ranks, ... and empty slots up to a full round."""
    norms = []
    for step in range(plan.first, plan.last):
        for attempt in range(2 if step == plan.discard else 1):
            count = MICRO_BATCHES[step]
            rounds = -(-count // world.size)
            for slot in range(rounds):
                index = slot * world.size + world.rank
                loss = micro_batch_loss(strategy.replicas[0], step, min(index, count - 1), plan.rare)
                factor = plan.scale / count / 6 * (index < count)
                strategy.backward(loss, factor=factor, last=slot == rounds - 1)
            norm = strategy.finish_gradients(unscale=1 / plan.scale, max_norm=plan.max_norm)
            for group in strategy.optimizer.param_groups:
                group["lr"] = 0.01 * (1 - step / 16)
            if step == plan.discard and attempt == 0:
                strategy.discard()
            else:
                norms.append(norm)
                strategy.update()
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


def plain(plan: Plan, build_optimizer: Any = adamw) -> tuple[list[float], State]:
    """Train in this process."""
    strategy = Replicated(make_net(), build_optimizer, world=World())
    strategy.restore(Reader(plan.start or initial_state()))
    norms = train(strategy, World(), plan)
    return norms, {(f.spec.name, f.spec.kind): f.tensor.clone().reshape(f.spec.shape) for f in strategy.state()}


Pieces = list[tuple[str, str, tuple[int, ...], int, int, Any]]  # with a numpy array: a tensor would be a handle


def _pieces(fragments: Iterable[Fragment]) -> Pieces:
    return [
        (f.spec.name, f.spec.kind, f.spec.shape, f.flat_start, f.flat_end, f.tensor.cpu().reshape(-1).numpy().copy())
        for f in fragments
    ]


def _on_rank(stage: str, plan: Plan, build_optimizer: Any = adamw) -> tuple[list[float], Pieces, Any]:
    torch.set_num_threads(1)
    world = connect(read_environment(os.environ))
    kind = STAGES[stage]
    net = make_net("meta" if kind.starts_empty else "cpu")
    strategy = kind(net, build_optimizer, world=world, settings=Settings(cpu_offload=plan.cpu_offload))
    reader = Reader(plan.start or initial_state())
    strategy.restore(reader)
    norms = train(strategy, world, plan)
    pieces = _pieces(strategy.state())
    disconnect(world)
    return norms, pieces, reader.asked


def assembled(by_rank: Sequence[Pieces]) -> State:
    """Join the ranks' pieces; every element must be there, and the same wherever it is there twice."""
    state: State = {}
    for same in zip(*by_rank, strict=True):
        name, kind, shape, *_ = same[0]
        assert all(piece[:3] == (name, kind, shape) for piece in same)
        flat = torch.full((torch.Size(shape).numel(),), float("nan"))
        for _, _, _, start, end, array in same:
            tensor = torch.from_numpy(array)
            assert tensor.numel() == end - start
            known = flat[start:end]
            assert torch.equal(torch.where(known.isnan(), tensor, known), tensor), (name, kind)
            flat[start:end] = tensor
        assert not flat.isnan().any(), (name, kind)
        assert (name, kind) not in state
        state[name, kind] = flat.reshape(shape)
    return state


def zero(num_ranks: int, stage: str, plan: Plan, build_optimizer: Any = adamw) -> tuple[list[float], State]:
    """Train on ranks."""
    results = run_on_ranks(num_ranks, _on_rank, stage, plan, build_optimizer)
    norms = [norms for norms, _, _ in results]
    assert norms == [norms[0]] * num_ranks
    asked = [asked for _, _, asked in results]
    assert asked == [asked[0]] * num_ranks
    return norms[0], assembled([pieces for _, pieces, _ in results])


def difference(found: State, expected: State) -> float:
    assert list(found) == list(expected)
    return max((found[key] - expected[key]).abs().max().item() for key in expected)


def assert_same_run(found: tuple[list[float], State], expected: tuple[list[float], State]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert difference(found[1], expected[1]) <= BOUND


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], State]:
    return plain(Plan())


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_those_of_one_process(
    stage: str, num_ranks: int, expected: tuple[list[float], State]
) -> None:
    found = zero(num_ranks, stage, Plan())
    print(stage, num_ranks, difference(found[1], expected[1]), max(abs(a - b) for a, b in zip(found[0], expected[0])))
    assert_same_run(found, expected)

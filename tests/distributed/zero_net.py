"""A net that has all that ZeRO must get right, and its state in memory."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from shardlaunch.checkpoints.state import MODEL, ONLY, OPTIMIZER, Replica, TensorSpec
from shardlaunch.launcher.optimization.optimizers import decay_groups
from shardlaunch.sharding.zero import Zero, Zero1, Zero2, Zero3

STAGES: dict[str, type[Zero]] = {"zero1": Zero1, "zero2": Zero2, "zero3": Zero3}
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
    """A state reader over tensors in memory; it notes what is asked for."""

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

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int, replica: Replica = ONLY) -> torch.Tensor:
        self.asked.append((spec.name, spec.entry))
        return self.tensors[spec.name, spec.entry].reshape(-1)[flat_start:flat_end].clone()


def initial_state() -> State:
    net = make_net()
    tensors = [*net.named_parameters(), ("mean", net.mean)]
    return {(name, ""): tensor.detach().clone() for name, tensor in tensors}

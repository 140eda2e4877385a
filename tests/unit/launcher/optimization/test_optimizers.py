"""Optimizers by name, parameter groups, L1, and invalid options."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Options, Recipe, UserError
from shardlaunch.launcher.optimization.optimizers import (
    build_optimizer,
    check_lr_factors,
    check_optimizer_options,
    separate,
)
from shardlaunch.launcher.recipe import check_in_effect


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, *, num_steps: int = 5) -> list[torch.Tensor]:
    inputs = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(num_steps):
        optimizer.zero_grad()
        net(inputs).pow(2).sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.01)),
        (
            {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        ),
        ({"optimizer": "adam", "betas": (0.8, 0.9)}, lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9))),
        ({"eps": 1e-3}, lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0)),
        (
            {"optimizer": "rmsprop", "optimizer_args": ("alpha=0.5", "centered=true")},
            lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.5, centered=True),
        ),
        ({"optimizer": "adagrad"}, lambda p: torch.optim.Adagrad(p, lr=0.01)),
        ({"optimizer": "torch.optim.NAdam"}, lambda p: torch.optim.NAdam(p, lr=0.01)),
        ({"weight_decay": 0.1, "decay_all": True}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_the_optimizer_is_the_one_that_is_named(options: dict[str, Any], reference: Any) -> None:
    net, other = _net(), _net()
    found = _train(net, build_optimizer(net.named_parameters(), Options(lr=0.01, **options)))
    expected = _train(other, reference(other.parameters()))
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-7)


def test_groups_by_decay_rate_and_what_was_frozen() -> None:
    net = _net()
    options = Options(lr=0.1, weight_decay=0.5, lr_factors=("2.*=0.5", "*=2"), freeze=("0.*",))
    optimizer = build_optimizer(net.named_parameters(), options)
    separate(optimizer, [parameter for name, parameter in net.named_parameters() if options.is_frozen(name)])
    groups = optimizer.param_groups
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = [([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]) for group in groups]
    assert found == [
        (["0.weight"], 0.2, 0.5),
        (["1.weight", "1.bias"], 0.2, 0.0),
        (["2.weight"], 0.05, 0.5),
        (["2.bias"], 0.05, 0.0),
        (["0.bias"], 0.2, 0.0),
    ]


def test_l1_is_soft_thresholding_of_matrices() -> None:
    weight, bias = nn.Parameter(torch.tensor([[0.5, -0.5, 0.001]])), nn.Parameter(torch.tensor([0.3]))
    optimizer = build_optimizer([("w", weight), ("b", bias)], Options(lr=0.1, optimizer="sgd", l1=0.2))
    weight.grad, bias.grad = torch.zeros(1, 3), torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.48, -0.48, 0.0]]))
    assert bias.item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimizer": "adamx"}, "--optimizer adamx: unknown; choose one of sgd"),
        ({"optimizer": "torch.optim.Adamx"}, "torch.optim.Adamx"),
        ({"optimizer": "no_such_module.Adam"}, "no_such_module"),
        ({"optimizer": "torch.nn.Linear"}, "not a torch.optim.Optimizer"),
        ({"optimizer": "torch.optim.SparseAdam"}, "sparse gradients"),
        ({"momentum": 0.9}, "--momentum: not supported by --optimizer adamw; supported: lr, betas"),
        ({"optimizer": "sgd", "betas": (0.9, 0.9)}, "--betas"),
        ({"optimizer_args": ("gamma=1",)}, "--optimizer-args gamma"),
        ({"optimizer_args": ("amsgrad",)}, "NAME=VALUE"),
        ({"optimizer_args": ("lr=3",)}, "argument that has no option"),
        ({"lr_factors": ("0.*",)}, "PATTERN=FACTOR"),
        ({"lr_factors": ("0.*=0",)}, "--freeze"),
        ({"lr_factors": ("0.*=2", "0.*=3")}, r"0\.\*=3: the pattern 0\.\* already has a factor"),
        ({"optimizer_args": ("foreach=[",)}, r"--optimizer-args \[: not readable"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_optimizer_options(Options(**options))


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"weight_decay": -1.0}, {"l1": math.nan}], ids=str)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        Options(**options)


def test_decay_of_all_without_decay() -> None:
    with pytest.raises(UserError, match="--decay-all: has no effect without --weight-decay or --l1"):
        Options(decay_all=True)


def test_numbers_as_yaml_does_not_read_them_and_other_loops() -> None:
    options = Options(optimizer="torch.optim.NAdam", optimizer_args=("momentum_decay=1e-3",))
    assert build_optimizer(_net().named_parameters(), options).defaults["momentum_decay"] == 1e-3
    options = Options(optimizer_args=("foreach=true",))
    assert not build_optimizer(_net().named_parameters(), options).defaults["fused"]
    with pytest.raises(UserError, match="--optimizer adamw: `fused` and `foreach` cannot be `True` together"):
        build_optimizer(_net().named_parameters(), Options(optimizer_args=("foreach=true", "fused=true")))


def test_values_that_the_optimizer_refuses_and_patterns_that_match_nothing() -> None:
    with pytest.raises(UserError, match="--optimizer sgd: Nesterov momentum requires"):
        build_optimizer(_net().named_parameters(), Options(optimizer="sgd", nesterov=True))
    with pytest.raises(UserError, match=r"--lr-factors: .* matches 9\.\* and no earlier pattern; available: 0.weight"):
        check_lr_factors(["0.weight"], Options(lr_factors=("0.*=2", "9.*=3")))
    with pytest.raises(UserError, match=r"--lr-factors: .* matches 0\.\* and no earlier pattern"):
        check_lr_factors(["0.weight"], Options(lr_factors=("*=2", "0.*=3")))


@dataclass(kw_only=True)
class _OwnOptions(Options):
    momentum: float = 0.5


class _Own(Recipe):
    options: _OwnOptions

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in parameters], lr=self.options.lr, momentum=self.options.momentum or 0)


def test_options_that_an_overridden_optimizer_ignores_are_refused() -> None:
    check_in_effect(_Own(_OwnOptions(momentum=0.9, lr=3.0)))
    with pytest.raises(
        UserError, match=r"--weight-decay: has no effect, because this recipe has its own optimizer\(\)"
    ):
        check_in_effect(_Own(_OwnOptions(weight_decay=0.1)))

"""The same bits on any number of ranks: losses, metrics, weights, optimizer, through changes of ranks and faults."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardlaunch import Recipe, UserError, fit
from shardlaunch.launcher.training import attention
from shardlaunch.launcher.training.exact_metrics import ExactMetrics
from shardlaunch.sharding.exact import ExactGradients, Units, summands
from shardlaunch.sharding.exact_step import step_exactly
from shardlaunch.sharding.resolve import STRATEGIES
from shardlaunch.sharding.strategy import Strategy
from shardlaunch.sharding.world import World
from tests.distributed.ranks import run_on_ranks
from tests.recipes import LabelSum, MaskedBert, NetRecipe, RankedNet, bits, losses, run_quietly

OPTIONS: dict[str, Any] = {
    "exact": True,
    "max_steps": 10,
    "eval_every": 5,
    "save_every": 5,
    "tracker": "none",
    "save_on_best": False,
}


class ExactNet(RankedNet):
    """The net of other tests, with a parameter without dimensions and rows that ranks cannot share evenly."""

    def model(self) -> nn.Module:
        net = super().model()
        net.scale = nn.Parameter(torch.tensor(0.5))
        net.register_forward_hook(lambda module, inputs, outputs: outputs * net.scale)
        return net


def _units_per_rank() -> None:
    """Let each rank choose units by its own gradients."""
    must_change = Units.must_change
    Units.must_change = lambda self, world: must_change(self, World())  # type: ignore[method-assign]


def _float_sums() -> None:
    """Sum over the ranks in float32."""

    def sum_next(self: ExactGradients) -> None:
        sums = self._sums[len(self._works)]
        floats = sums.float()
        dist.all_reduce(floats)
        sums.copy_(floats)
        self._works.append(dist.all_reduce(torch.zeros(1), async_op=True))

    ExactGradients._sum_next = sum_next  # type: ignore[method-assign]


def _fit_wrongly(change: Callable[[], None], run_dir: Path) -> None:
    """Run in a process of its own, with a fault."""
    change()
    fit(ExactNet, output_dir=run_dir, strategy="ddp", **OPTIONS)


def _fit(recipe_type: type[Recipe], run_dir: Path, options: dict[str, Any]) -> int:
    """Run, and return how often a step was run again."""
    repeated = 0
    strategy = STRATEGIES[options.get("strategy", "ddp" if "RANK" in os.environ else "single")]
    must_repeat = strategy.must_repeat

    def counted(self: Strategy) -> bool:
        nonlocal repeated
        again = must_repeat(self)
        repeated += again
        return again

    strategy.must_repeat = counted  # type: ignore[method-assign]
    try:
        with patch.object(attention, "LEAST_TOKENS", 1):
            fit(recipe_type, output_dir=run_dir, **OPTIONS | options)
    finally:
        strategy.must_repeat = must_repeat  # type: ignore[method-assign]
    return repeated


def _on_ranks(num_ranks: int, recipe_type: type[Recipe], run_dir: Path, **options: Any) -> list[int]:
    if num_ranks == 1 and options.get("strategy", "single") == "single":
        return [_fit(recipe_type, run_dir, options)]
    repeated: list[int] = run_on_ranks(num_ranks, _fit, recipe_type, run_dir, options)
    return repeated


@pytest.mark.parametrize(
    ("options", "topologies"),
    [
        ({}, [("dp", 1), ("ddp", 3), ("fsdp2", 1), ("fsdp2", 3), ("hsdp", 4)]),
        ({"precision": "bf16", "num_workers": 2}, [("ddp", 2), ("fsdp2", 2)]),
        ({"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "max_grad_norm": 0.01}, [("fsdp2", 2)]),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_ranks_and_strategy(
    options: dict[str, Any], topologies: list[tuple[str, int]], tmp_path: Path
) -> None:
    assert _on_ranks(1, ExactNet, tmp_path / "single", **options) == [1], "the first step has no units yet"
    expected = bits(tmp_path / "single")
    for strategy, num_ranks in topologies:
        run_dir = tmp_path / f"{strategy}-{num_ranks}"
        assert _on_ranks(num_ranks, ExactNet, run_dir, strategy=strategy, **options) == [1] * num_ranks
        assert bits(run_dir) == expected, (strategy, num_ranks)


def _fit_on_gpu(run_dir: Path, strategy: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "false"
    fit(ExactNet, output_dir=run_dir, strategy=strategy, **OPTIONS)


@pytest.mark.gpu
def test_bits_on_a_gpu_do_not_depend_on_the_strategy(tmp_path: Path) -> None:
    for strategy in ("single", "dp", "ddp", "fsdp2"):
        run_on_ranks(1, _fit_on_gpu, tmp_path / strategy, strategy)
        assert bits(tmp_path / strategy) == bits(tmp_path / "single"), strategy


class Unpooled(NetRecipe):
    """A net with an operation whose kernels add in any order."""

    def model(self) -> nn.Module:
        net = super().model()
        net.register_forward_hook(lambda module, inputs, outputs: outputs + _added_anyhow(outputs))
        return net


def _added_anyhow(outputs: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(outputs).put_(torch.zeros(2, dtype=torch.int64), outputs.detach()[0, :2], accumulate=False)


def test_an_operation_without_a_deterministic_kernel_is_refused(tmp_path: Path) -> None:
    argv = ["--exact", "--output-dir", str(tmp_path / "run")]
    ((status, output),) = run_on_ranks(1, run_quietly, Unpooled, argv)
    assert status == 2
    assert "error: --exact: put_ has no kernel that computes the same bits each time on this device" in output


def test_other_kernels_at_a_resume_are_said(tmp_path: Path) -> None:
    fit(ExactNet, output_dir=tmp_path, **OPTIONS)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.warns(match=r"may round differently: kernels: .* in highest .* -> .* in high precision"):
            fit(ExactNet, output_dir=tmp_path, extend_to_steps=11, **OPTIONS)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("change", [_units_per_rank, _float_sums])
def test_a_fault_in_the_sums_is_seen(change: Callable[[], None], tmp_path: Path) -> None:
    _on_ranks(1, ExactNet, tmp_path / "single")
    run_on_ranks(3, _fit_wrongly, change, tmp_path / "wrong")
    assert losses(tmp_path / "wrong") == pytest.approx(losses(tmp_path / "single"), rel=5e-3), "the fault is small"
    assert bits(tmp_path / "wrong") != bits(tmp_path / "single")


def test_without_exact_sums_they_do(tmp_path: Path) -> None:
    for num_ranks in (1, 3):
        _on_ranks(num_ranks, RankedNet, tmp_path / str(num_ranks), exact=False, threads_per_rank=1)
    assert bits(tmp_path / "1") != bits(tmp_path / "3")


def test_a_transformer_goes_on_with_other_ranks(tmp_path: Path) -> None:
    _on_ranks(1, MaskedBert, tmp_path / "whole")
    for stop, strategy, num_ranks in ((3, "fsdp2", 4), (4, "single", 1), (7, "hsdp", 4), (10, "ddp", 3)):
        at = stop if stop < 10 else 0
        _on_ranks(num_ranks, MaskedBert, tmp_path / "run", strategy=strategy, stop_at_step=at)
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


class Jumping(NetRecipe):
    """A net whose loss grows a millionfold at one step, and overflows in fp16."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        jump = 1e6 if self.moment.step == 6 and not self.moment.is_evaluation else 1.0
        return super().loss(outputs, batch) * jump


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_whose_gradients_grow_is_run_again(precision: str, tmp_path: Path) -> None:
    (repeated,) = _on_ranks(1, Jumping, tmp_path / "1", precision=precision)
    assert repeated >= 2 - (precision == "fp16")
    assert _on_ranks(2, Jumping, tmp_path / "2", precision=precision) == [repeated] * 2
    assert bits(tmp_path / "1") == bits(tmp_path / "2")


def test_exact_sums_change_the_run_by_rounding_only(tmp_path: Path) -> None:
    for is_exact in (True, False):
        _on_ranks(1, NetRecipe, tmp_path / str(is_exact), exact=is_exact, threads_per_rank=1)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strategy", "zero2"), "--exact: not under zero2, which sums by itself; use --strategy ddp, fsdp2 or hsdp"),
        (("--compile",), "--exact: not with --compile"),
        (("--micro-batch-size", "1", "--global-batch-size", "5000"), "5,000 micro-batches is too many"),
    ],
)
def test_what_cannot_be_exact_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    argv = ["--exact", "--output-dir", str(tmp_path / "run"), *words]
    ((status, output),) = run_on_ranks(1, run_quietly, NetRecipe, argv)
    assert status == 2
    assert message in output


class OwnWay(LabelSum):
    """A metric with a state that ranks join in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("last", default=torch.zeros(()), dist_reduce_fx=lambda stacked: stacked[-1])


def test_a_metric_that_ranks_cannot_join_exactly_is_refused() -> None:
    metrics = {"labels": LabelSum(), "mine": 1 + OwnWay()}
    with pytest.raises(
        UserError, match=r"--exact: the state 'last' of metric 'mine' \(OwnWay\) is joined over ranks in"
    ):
        ExactMetrics(metrics, world=World())


def test_the_sum_is_near_the_real_one() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    exact = ExactGradients({"p": parameter}, world=World())
    gradients = torch.randn(16, 1000, dtype=torch.float64) * torch.logspace(-6, 0, 1000, dtype=torch.float64)
    for is_again in (False, True):
        for gradient in gradients:
            parameter.backward(gradient)
        assert exact.must_repeat() != is_again
    exact.finish()
    assert parameter.grad is not None
    error = (parameter.grad - gradients.sum(0)).abs().max()
    assert 0 < error <= 2.0**-40 * gradients.abs().max()


def test_summands_add_up_in_any_order() -> None:
    torch.manual_seed(0)
    values = torch.randn(10_000).double() * 10.0 ** torch.randint(-12, 6, (10_000,))
    parts = summands(values)
    assert parts.shape == (3, 10_000)
    assert torch.allclose(parts.sum(0), values, rtol=2.0**-52, atol=2.0**-81)
    orders = [torch.randperm(10_000) for _ in range(3)]
    sums = {tuple(parts[:, order].cumsum(1)[:, -1].tolist()) for order in orders}
    assert len(sums) == 1, "no partial sum rounds"
    assert len({values[order].cumsum(0)[-1].item() for order in orders}) > 1, "else this shows nothing"
    assert summands(torch.tensor([torch.inf, -torch.inf])).sum(0).tolist() == [torch.inf, -torch.inf]


OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "ASGD")


@pytest.mark.parametrize(
    ("name", "more"),
    [(name, {}) for name in OPTIMIZERS]
    + [(name, {"fused": True}) for name in ("Adagrad", "Adam", "AdamW", "SGD")]
    + [("SGD", {"momentum": 0.9, "fused": True}), ("AdamW", {"amsgrad": True, "fused": True})],
    ids=str,
)
def test_a_step_does_not_depend_on_how_a_tensor_is_divided(name: str, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(1000), torch.randn(6, 1000)
    options = {"lr": 0.01, **({"weight_decay": 0.1} if name != "Rprop" else {}), **more}
    found = []
    for cuts in ((1000,), (331, 331, 338), (3,) * 60 + (820,)):
        parts = [nn.Parameter(part.clone()) for part in start.split(cuts)]
        optimizer = getattr(torch.optim, name)(parts, **options)
        for gradient in gradients:
            for part, its_gradient in zip(parts, gradient.split(cuts), strict=True):
                part.grad = its_gradient.clone()
            step_exactly(optimizer)
        found.append(torch.cat([part.detach() for part in parts]))
    usual = nn.Parameter(start.clone())
    optimizer = getattr(torch.optim, name)([usual], **options)
    for gradient in gradients:
        usual.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.allclose(found[0], usual, rtol=1e-5, atol=1e-6)


class OfPowers(torch.optim.SGD):
    """An optimizer with an operation whose vectors and ends may differ."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad.exp())


def test_an_optimizer_of_other_operations_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(UserError, match=r"--exact: OfPowers uses exp\(\)"):
        step_exactly(OfPowers([parameter], lr=0.1))

"""The same bits on any number of ranks: losses, metrics, weights, optimizer, through changes of ranks and faults."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shardlaunch import Recipe, fit
from shardlaunch.sharding.exact import ExactGradients, summands
from shardlaunch.sharding.world import World
from tests.distributed.ranks import run_on_ranks
from tests.recipes import MaskedBert, NetRecipe, RankedNet, final_tensors, losses, run_quietly, training_lines

OPTIONS: dict[str, Any] = {
    "exact": True,
    "max_steps": 10,
    "eval_every": 5,
    "save_every": 5,
    "tracker": "none",
    "save_on_best": False,
}


def _fit(recipe_type: type[Recipe], run_dir: Path, options: dict[str, Any]) -> int:
    """Run, and return how often a step was run again."""
    repeated = 0
    must_repeat = ExactGradients.must_repeat

    def counted(self: ExactGradients) -> bool:
        nonlocal repeated
        again = must_repeat(self)
        repeated += again
        return again

    ExactGradients.must_repeat = counted  # type: ignore[method-assign]
    try:
        fit(recipe_type, output_dir=run_dir, **OPTIONS | options)
    finally:
        ExactGradients.must_repeat = must_repeat  # type: ignore[method-assign]
    return repeated


def _on_ranks(num_ranks: int, recipe_type: type[Recipe], run_dir: Path, **options: Any) -> list[int]:
    if num_ranks == 1:
        return [_fit(recipe_type, run_dir, options)]
    repeated: list[int] = run_on_ranks(num_ranks, _fit, recipe_type, run_dir, options)
    return repeated


def _bits(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    lines = [{key: value for key, value in line.items() if key != "skipped"} for line in training_lines(run_dir)]
    tensors = final_tensors(run_dir)
    return lines, {name: tensor.view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"num_workers": 2}], ids=str)
def test_bits_do_not_depend_on_the_ranks(options: dict[str, Any], tmp_path: Path) -> None:
    assert _on_ranks(1, RankedNet, tmp_path / "1", **options) == [1]
    for num_ranks in (2, 3):
        assert _on_ranks(num_ranks, RankedNet, tmp_path / str(num_ranks), **options) == [1] * num_ranks
        assert _bits(tmp_path / str(num_ranks)) == _bits(tmp_path / "1")


def test_without_exact_sums_they_do(tmp_path: Path) -> None:
    for num_ranks in (1, 3):
        _on_ranks(num_ranks, RankedNet, tmp_path / str(num_ranks), exact=False, threads_per_rank=1)
    assert _bits(tmp_path / "1") != _bits(tmp_path / "3")


def test_a_transformer_goes_on_with_other_ranks(tmp_path: Path) -> None:
    _on_ranks(1, MaskedBert, tmp_path / "whole")
    for stop, num_ranks in ((3, 4), (4, 1), (7, 2), (10, 3)):
        _on_ranks(num_ranks, MaskedBert, tmp_path / "run", stop_at_step=stop if stop < 10 else 0)
    assert _bits(tmp_path / "run") == _bits(tmp_path / "whole")


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
    assert _bits(tmp_path / "1") == _bits(tmp_path / "2")


def test_exact_sums_change_the_run_by_rounding_only(tmp_path: Path) -> None:
    for is_exact in (True, False):
        _on_ranks(1, NetRecipe, tmp_path / str(is_exact), exact=is_exact, threads_per_rank=1)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strategy", "fsdp2"), "--exact: not under fsdp2; use --strategy ddp"),
        (("--compile",), "--exact: not with --compile"),
        (("--micro-batch-size", "1", "--global-batch-size", "5000"), "5,000 micro-batches is too many"),
    ],
)
def test_what_cannot_be_exact_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    argv = ["--exact", "--output-dir", str(tmp_path / "run"), *words]
    ((status, output),) = run_on_ranks(1, run_quietly, NetRecipe, argv)
    assert status == 2
    assert message in output


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

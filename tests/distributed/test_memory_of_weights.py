"""How weights lie in memory does not change a run: another order of elements, and memory that tensors share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Recipe, UserError, fit
from shardlaunch.launcher.runs.model import checked_model
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NUM_CLASSES, NUM_FEATURES, NetRecipe, final_tensors, losses

OPTIONS: dict[str, Any] = {"max_steps": 4, "save_every": 2, "lr": 0.05, "threads_per_rank": 1}


class Plain(NetRecipe):
    """A convolution and a linear layer."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (3, 2, NUM_FEATURES // 6)), nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, NUM_CLASSES)
        )


class LaidOut(Plain):
    """The same with weights whose elements lie in another order."""

    def model(self) -> nn.Module:
        model = super().model().to(memory_format=torch.channels_last)
        turned = model[3].weight.detach().t().contiguous().t()
        model[3].weight = nn.Parameter(turned)
        assert not any(model[number].weight.is_contiguous() for number in (1, 3))
        return model


def _fit(recipe_type: type[Recipe], run_dir: Path, strategy: str) -> None:
    for stop in (2, 0):
        fit(recipe_type, output_dir=run_dir, strategy=strategy, stop_at_step=stop, **OPTIONS)


def test_the_order_of_elements_in_memory_changes_nothing(tmp_path: Path) -> None:
    """Not even through a resume. A fused AdamW went by the order in memory, of weights and gradients each."""
    _fit(Plain, tmp_path / "plain", "single")
    expected = losses(tmp_path / "plain")
    for strategy in ("single", "dp"):
        _fit(LaidOut, tmp_path / strategy, strategy)
        assert losses(tmp_path / strategy) == expected
        tensors = final_tensors(tmp_path / strategy)
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in final_tensors(tmp_path / "plain").items())
    for strategy in ("fsdp2", "zero2"):
        run_on_ranks(2, _fit, LaidOut, tmp_path / strategy, strategy)
        assert losses(tmp_path / strategy) == pytest.approx(expected, rel=1e-6), strategy


def _pair(second: Callable[[nn.Linear], nn.Parameter]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = second(model[0])
    return model


def _with_buffer() -> nn.Module:
    model = nn.Linear(4, 4)
    model.register_buffer("mean", model.weight.detach()[0])
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: _pair(lambda first: nn.Parameter(first.weight)),
        lambda: _pair(lambda first: nn.Parameter(first.weight.t())),
        lambda: _pair(lambda first: nn.Parameter(first.weight.data[:, :2])),
        _with_buffer,
    ],
)
def test_memory_of_two_parameters_is_refused(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(UserError, match="have the same memory, but are not one parameter"):
        checked_model(model())


def test_tied_parameters_and_parts_of_one_memory_are_not() -> None:
    halves = torch.rand(4, 8)
    model = _pair(lambda first: first.weight)
    model[0].weight = nn.Parameter(halves[:, :4])
    model[1].weight = nn.Parameter(halves[:, 4:])
    checked_model(model)
    model[1].weight = model[0].weight
    checked_model(model)

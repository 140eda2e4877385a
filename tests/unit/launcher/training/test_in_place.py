"""A forward pass that changes parameters is found, however it does so."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shardlaunch import UserError
from shardlaunch.launcher.training.in_place import parameters_stay


class Averaging(nn.Module):
    """A student, and a teacher that follows it in the forward pass."""

    def __init__(self, follow: Callable[[nn.Module, nn.Module], None]) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        self.follow = follow

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.follow(self.student, self.teacher)
        return self.student(inputs) + self.teacher(inputs)


def _assign(student: nn.Module, teacher: nn.Module) -> None:
    teacher.weight.data = 0.9 * teacher.weight.data + 0.1 * student.weight.data


@pytest.mark.parametrize(
    "follow",
    [
        lambda student, teacher: teacher.weight.lerp_(student.weight, 0.1),
        lambda student, teacher: teacher.weight.data.mul_(0.9).add_(0.1 * student.weight.data),
        _assign,
    ],
)
def test_averages_of_weights_are_found(follow: Callable[[nn.Module, nn.Module], None]) -> None:
    model = Averaging(follow)
    with pytest.raises(UserError, match=r"changes teacher\.weight in place"), parameters_stay(model):
        model(torch.ones(2, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_embedding_with_a_largest_norm_is_found() -> None:
    model = nn.Sequential(nn.Embedding(5, 8, max_norm=0.1))
    with pytest.raises(UserError, match=r"changes 0\.weight in place"), parameters_stay(model):
        model(torch.tensor([1, 2]))


@pytest.mark.parametrize("place", range(9))
def test_each_element_of_a_parameter_counts(place: int) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(10.0)[1:])  # begins, and ends, between two integers of 64 bits
    with pytest.raises(UserError, match="changes weight in place"), parameters_stay(model), torch.no_grad():
        model.weight[place] += 1


def test_buffers_may_change() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))
    with parameters_stay(model):
        model(torch.rand(3, 4))

"""Which parameters are frozen when, and how it is shown."""

import pytest
import torch
from torch import nn

from shardlaunch import Options, UserError
from shardlaunch.launcher.optimization.freezing import freeze, train_mode
from shardlaunch.launcher.optimization.optimizers import build_optimizer
from shardlaunch.launcher.reporting.parameters import ParameterRow, parameter_rows


def _net() -> nn.Module:
    net = nn.Sequential()
    net.features = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net.head = nn.Linear(4, 2)
    return net


@pytest.mark.parametrize(("step", "is_frozen"), [(0, True), (4, True), (5, False), (6, False)])
def test_parameters_are_frozen_by_name_up_to_a_step(step: int, is_frozen: bool) -> None:
    net = _net()
    freeze(net, Options(freeze=("features.*",), unfreeze_at_step=5), step=step)
    assert [parameter.requires_grad for parameter in net.parameters()] == [not is_frozen] * 4 + [True] * 2


def test_frozen_norms_keep_their_statistics() -> None:
    net = _net()
    train_mode(net)
    assert net.features[1].training
    freeze(net, Options(freeze=("features.*",)), step=0)
    train_mode(net)
    assert (net.training, net.features[1].training, net.head.training) == (True, False, True)


def test_the_table_has_a_row_for_what_is_alike() -> None:
    net = _net()
    options = Options(freeze=("features.*",), lr=0.5, weight_decay=0.1)
    numels = {name: parameter.numel() for name, parameter in net.named_parameters()}
    freeze(net, options, step=0)
    trained = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert parameter_rows(numels, trained, build_optimizer(trained, options)) == [
        ParameterRow(names="features.*", num_tensors=4, num_elements=24, lr=None, weight_decay=0.0),
        ParameterRow(names="head.weight", num_tensors=1, num_elements=8, lr=0.5, weight_decay=0.1),
        ParameterRow(names="head.bias", num_tensors=1, num_elements=2, lr=0.5, weight_decay=0.0),
    ]


def test_parts_of_a_model_are_modules_of_modules_but_not_of_lists() -> None:
    names = ["bert.encoder.layer.0.bias", "bert.encoder.layer.1.bias", "features.3.bias", "features.4.bias", "scale"]
    parameters = [(name, nn.Parameter(torch.ones(1))) for name in names]
    rows = parameter_rows(dict.fromkeys(names, 1), parameters, build_optimizer(parameters, Options()))
    assert [row.names for row in rows] == ["bert.encoder.*", "features.*", "scale"]
    alone = [("scale", nn.Parameter(torch.ones(1))), ("shift", nn.Parameter(torch.ones(1)))]
    rows = parameter_rows({"scale": 1, "shift": 1}, alone, build_optimizer(alone, Options()))
    assert [row.names for row in rows] == ["(top level)"]


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"--freeze: no parameter matches body\.\*; available: features.0.weight"):
        freeze(_net(), Options(freeze=("features.*", "body.*")), step=0)
    with pytest.raises(UserError, match="no parameter is left to train"):
        freeze(_net(), Options(freeze=("*",)), step=0)
    with pytest.raises(UserError, match="has no effect without --freeze"):
        Options(unfreeze_at_step=3)

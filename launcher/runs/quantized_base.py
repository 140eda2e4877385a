"""A frozen base model in 8 bits: its linear layers keep integers and a scale per row in the place of weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardlaunch.launcher.runs.preflight import bytes_text

_HALF_RANGE = 127.5  # from -128 to 127
_LEAST_SCALE = torch.finfo(torch.float32).eps  # of a row of zeros


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a base model took before and takes since its linear layers are quantized."""

    num_layers: int
    bytes_before: int
    """Of all its parameters."""
    num_bytes: int

    def describe(self) -> str:
        """Return it for the start-up summary."""
        return (
            f"base in 8 bits: {self.num_layers} layers, {bytes_text(self.num_bytes)} instead of "
            f"{bytes_text(self.bytes_before)}"
        )


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in 8 bits, with the values that torchao's `Int8WeightOnlyConfig` gives weights in fp32.

    A weight is its integer times the scale of its row. The weights are computed anew by each forward and each backward
    pass, of one layer at a time; a layer of torchao would leave them to autograd, which keeps those of all layers.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # a linear layer's own would make weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = (weight.abs().amax(1, keepdim=True).float() / _HALF_RANGE).clamp(min=_LEAST_SCALE)
        integers = (weight.float() * (1 / scales)).round().clamp(-128, 127).to(torch.int8)
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias
        self.dtype = weight.dtype
        self.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weights in floating point. Changes of this tensor are not kept."""
        return (self.integers * self.scales).to(self.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply, in the dtype of autocast if that is on."""
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        outputs: torch.Tensor = _Linear.apply(inputs, self.integers, self.scales, self.bias)
        return outputs


class _Linear(torch.autograd.Function):
    """A linear function that keeps integers and scales for its backward pass, and no weights."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(integers, scales)
        weight = (integers * scales).to(inputs.dtype)
        return nn.functional.linear(inputs, weight, None if bias is None else bias.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        integers, scales = ctx.saved_tensors
        return gradient @ (integers * scales).to(gradient.dtype), None, None, None


def quantize(model: nn.Module, names: Iterable[str]) -> None:
    """Put linear layers in 8 bits in the place of some, in evaluation or training mode as these are."""
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, QuantizedLinear(model.get_submodule(name)))  # type: ignore[arg-type]


def num_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Return how many bytes some parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

"""Mixed precision: the dtype of the forward pass, and the loss scale that fp16 needs. Weights stay in fp32."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from shardlaunch.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Autocast dtypes; with fp8 it applies to everything but the large matrix products."""
_ACCELERATE_NAMES = {"no": None, "fp16": "fp16", "bf16": "bf16", "fp8": "fp8"}
_FP8_CAPABILITY = (8, 9)  # the first NVIDIA GPUs with fp8 matrix products
_FP8_MULTIPLE = 16  # both dimensions of an fp8 matrix must be multiples of it


def resolve_precision(option: str, accelerate: str | None) -> str:
    """Return the precision's name from `--precision` and accelerate's configuration.

    Raises UserError for unknown names and when the two differ. `accelerate launch` passes "no" even if it is not set.
    """
    if accelerate is not None and accelerate not in _ACCELERATE_NAMES:
        raise UserError(
            f"accelerate's configuration sets mixed_precision {accelerate!r}; available: no, bf16, fp16, fp8"
        )
    launched = _ACCELERATE_NAMES[accelerate] if accelerate else None
    if option == "auto":
        return launched or "fp32"
    if option not in PRECISIONS:
        raise UserError(f"--precision {option}: unknown; choose one of auto, {', '.join(PRECISIONS)}")
    if launched and launched != option:
        raise UserError(f"--precision {option}, but accelerate's configuration sets {launched}. Remove one of the two.")
    return option


@dataclass(kw_only=True)
class LossScale:
    """Scale the loss so that fp16 gradients neither vanish nor overflow (dynamic loss scaling).

    Halved when a step overflows, doubled after `growth_interval` steps without overflow, as torch.amp.GradScaler does.
    """

    value: float = 65536.0
    good_steps: int = 0
    growth_interval: int = 2000

    def update(self, *, overflow: bool) -> None:
        """Adjust the scale after a step. Raises UserError when no scale is small enough."""
        if overflow:
            self.value /= 2
            self.good_steps = 0
            if self.value < 2.0**-14:
                raise UserError("fp16: gradients overflow at every loss scale; use --precision bf16 or fp32")
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.value *= 2
                self.good_steps = 0

    def state(self) -> dict[str, Any]:
        """Return the values to save in a checkpoint."""
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the values of a checkpoint."""
        self.value, self.good_steps = state["value"], state["good_steps"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A precision in effect: its name, the context of the forward pass, and the loss scale (fp16 only)."""

    name: str
    forward_context: Callable[[], AbstractContextManager[Any]]
    loss_scale: LossScale | None


def apply_precision(name: str, device: torch.device) -> Precision:
    """Return a precision for a device. Raises UserError when the device does not support it."""
    if name == "fp8":
        _check_fp8(device)
    if name == "fp32":
        return Precision(name=name, forward_context=nullcontext, loss_scale=None)
    dtype = PRECISIONS[name]

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=dtype)

    actual = _actual_dtype(device, autocast)
    if actual != dtype:
        raise UserError(f"--precision {name}: {device.type} computes in {actual} instead; use bf16 or fp32")
    return Precision(name=name, forward_context=autocast, loss_scale=LossScale() if name == "fp16" else None)


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
        raise UserError(
            f"--precision fp8: needs a GPU of compute capability {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} or newer; "
            f"found {found}. Use bf16 or fp32."
        )
    if find_spec("torchao") is None:
        raise UserError('--precision fp8: torchao is not installed: pip install "shardlaunch[fp8]"')


def convert_model(model: nn.Module, name: str) -> None:
    """Make linear layers multiply in fp8 if the precision is fp8. Weights stay in fp32."""
    if name == "fp8":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=_can_multiply_in_fp8)


def _can_multiply_in_fp8(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not (
        module.in_features % _FP8_MULTIPLE or module.out_features % _FP8_MULTIPLE
    )


def _actual_dtype(device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]) -> object:
    """Return the dtype in which a matrix product and its backward pass actually run, or why they fail."""
    weight = torch.ones(2, 2, device=device, requires_grad=True)
    try:
        with autocast():
            product = torch.nn.functional.linear(weight, weight)
        product.sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return product.dtype

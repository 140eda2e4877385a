"""What GPU kernels keep where the CPU's keep more: attention without its probabilities, dropout as a mask of booleans.

Tensors of a plan are on the CPU, without values; while `gpu_kernels` is entered, operations on them keep for the
backward pass what their CUDA kernels would, and autocast computes in float32 what it does on CUDA.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.library import Library

MOST_HEAD_DIM = 256  # of the fused kernels
_aten = torch.ops.aten
# CUDA's autocast computes these in float32, and the CPU's does not.
_IN_FLOAT32 = (
    "layer_norm",
    "group_norm",
    "rms_norm",
    "logsumexp",
    "pow.Tensor_Scalar",
    "exp",
    "log",
    "rsqrt",
    "softplus",
)
# These too, unless they are given a dtype.
_IN_FLOAT32_BY_DEFAULT = ("softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList")


@contextmanager
def gpu_kernels(count_flops: Callable[[int], None]) -> Iterator[None]:
    """Let operations keep what CUDA kernels keep; `count_flops` is told of the attention's."""
    library = Library("aten", "IMPL")
    try:
        library.impl("scaled_dot_product_attention", partial(_attention, count_flops), "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        for name in (*_IN_FLOAT32, *_IN_FLOAT32_BY_DEFAULT):
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(_aten, packet), overload or "default")
            dtype_as_given = name in _IN_FLOAT32_BY_DEFAULT
            library.impl(name, partial(_in_float32, operation, dtype_as_given), "AutocastCPU")
        yield
    finally:
        library._destroy()


def _in_float32(operation: Any, dtype_as_given: bool, *args: Any, **kwargs: Any) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        if not dtype_as_given:
            args = tuple(_as_float32(arg) for arg in args)
        elif args[0].dtype in (torch.bfloat16, torch.float16) and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return operation(*args, **kwargs)


def _as_float32(arg: Any) -> Any:
    is_low = isinstance(arg, torch.Tensor) and arg.dtype in (torch.bfloat16, torch.float16)
    return arg.float() if is_low else arg


def _dropout(inputs: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or not p or not inputs.numel():
        return inputs
    return torch.native_dropout(inputs, p, train)[0]


def _attention(
    count_flops: Callable[[int], None],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Keep what fused attention does: its inputs, its output and a sum per row."""
    if query.ndim != 4 or query.dtype == torch.float64 or max(query.shape[-1], value.shape[-1]) > MOST_HEAD_DIM:
        result: torch.Tensor = _aten._scaled_dot_product_attention_math.default(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return result
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # fused kernels add it
    attended: torch.Tensor = _FusedAttention.apply(query, key, value, attn_mask, count_flops)
    return attended


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        count_flops: Callable[[int], None],
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        ctx.count_flops = count_flops
        ctx.flops = 2 * batch * heads * length * key.shape[2] * (query.shape[-1] + value.shape[-1])
        count_flops(ctx.flops)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, _, sums = ctx.saved_tensors
        ctx.count_flops(5 * ctx.flops // 2)
        _deltas = torch.empty_like(sums)
        _accumulated = torch.empty_like(query, dtype=torch.float32)
        heads = query.shape[1]
        gradients = [query.new_empty(query.shape)]
        for shared in (key, value):  # per head of the query, then summed over those that share one
            each = shared.new_empty(shared.shape[0], heads, *shared.shape[2:])
            gradients.append(each if heads == shared.shape[1] else each.unflatten(1, (shared.shape[1], -1)).sum(2))
        return (*gradients, None, None)

"""What GPU kernels keep where the CPU's keep more: attention without its probabilities, dropout as a mask of booleans.

Tensors of a plan are on the CPU, without values; while `gpu_kernels` is entered, operations on them keep for the
backward pass what their CUDA kernels would, and autocast computes in float32 what it does on CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.library import Library

MOST_HEAD_DIM = 256  # of the fused kernels
_LOW = (torch.bfloat16, torch.float16)
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
def gpu_kernels() -> Iterator[None]:
    """Let operations keep what CUDA kernels keep."""
    library = Library("aten", "IMPL")
    try:
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
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
        elif args[0].dtype in _LOW and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return operation(*args, **kwargs)


def _as_float32(arg: Any) -> Any:
    is_low = isinstance(arg, torch.Tensor) and arg.dtype in _LOW
    return arg.float() if is_low else arg


def _dropout(inputs: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or not p or not inputs.numel():
        return inputs
    return torch.native_dropout(inputs, p, train)[0]


def _attention(
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
    """Choose the kernel that CUDA would: flash attention, memory-efficient attention, else plain products."""
    is_low = query.dtype in _LOW
    shares_heads = query.ndim == 4 and query.shape[1] != key.shape[1]
    is_fusible = (
        query.ndim == 4
        and (is_low or query.dtype == torch.float32)
        and query.shape[-1] == value.shape[-1] <= MOST_HEAD_DIM
    )
    attended: torch.Tensor
    if is_fusible and is_low and attn_mask is None:
        attended = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    elif is_fusible and not shares_heads:
        if attn_mask is not None:
            bias = attn_mask if attn_mask.dtype == query.dtype else torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        attended = _aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
    else:
        attended = _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    return attended


def workspace_bytes(operation: Any, args: tuple[Any, ...]) -> int:
    """Return what the kernel of an operation takes besides its results, while it runs."""
    if operation is not _aten._scaled_dot_product_flash_attention_backward.default:
        return 0
    _, query, key, *_ = args
    sums_and_queries = query.shape[0] * query.shape[1] * query.shape[2] * (query.shape[3] + 1) * 4  # in float32
    shares = query.shape[1] // key.shape[1]
    per_head = 2 * shares * key.numel() * key.element_size() if shares > 1 else 0
    return int(sums_and_queries + per_head)

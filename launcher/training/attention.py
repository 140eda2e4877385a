"""Attention with dropout on the CPU, in the place of transformers' for as long as a run trains.

PyTorch has no fused kernel for it there, and computes whole matrices of probabilities for all heads at once, with a
slow generator. Here a few heads at a time stay in the cache, random bits are drawn four numbers at a time, and only one
byte per probability is kept for the backward pass, which computes the rest again. Without dropout, for short
sequences, and for all that is not plain attention in fp32, transformers' own function goes on to be called.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shardlaunch.launcher.options import Options

LEAST_TOKENS = 192
"""Of a sequence: below, there is little to gain."""
_CHUNK = 1 << 18  # probabilities that stay in the cache between the operations on them
_VALUES = 1 << 16  # of a random number

Attention = Callable[..., tuple[torch.Tensor, Any]]


@contextmanager
def faster_attention(options: Options, device: torch.device) -> Iterator[None]:
    """Let transformers' models on the CPU compute attention with dropout by `attend`, where `sdpa` is chosen.

    Not with --attention plain, nor --compile, which has kernels of its own.
    """
    is_wanted = options.attention == "auto" and not options.compile and device.type == "cpu"
    if not is_wanted or "transformers.modeling_utils" not in sys.modules:
        yield
        return
    from transformers.modeling_utils import AttentionInterface

    plain = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", _attention(plain))
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", plain)


def _attention(plain: Attention) -> Attention:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, Any]:
        if not _is_plain(module, query, key, value, attention_mask, dropout, others):
            return plain(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **others,
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = _triangle(query, key) if causal and attention_mask is None else _as_bias(attention_mask)
        return attend(query, key, value, bias, dropout=dropout, scale=scale).transpose(1, 2).contiguous(), None

    return attention


def _is_plain(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> bool:
    """Return whether `attend` can compute what is asked for, and faster."""
    if not 0 < dropout < 1 or min(query.shape[2], key.shape[2]) < LEAST_TOKENS:
        return False
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in (query, key, value)):
        return False
    if getattr(module, "num_key_value_groups", 1) > 1 or query.shape[:2] != key.shape[:2]:
        return False
    if any(others.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux")):
        return False
    if mask is None:
        return query.shape[2] == key.shape[2]
    if mask.ndim != 4 or mask.requires_grad or mask.shape[-1] != key.shape[2]:
        return False
    # A query that sees no key has no probabilities; what it gets is the library's business.
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return mask.dtype in (torch.bool, torch.float32) and bool(sees.any(-1).all())


def _triangle(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.full((1, 1, query.shape[2], key.shape[2]), -torch.inf).triu_(1)


def _as_bias(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return None if bool(mask.all()) else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Return softmax(scale * query @ key^T + bias) with dropout, @ value: fp32, [batch, heads, tokens, size].

    `bias` is [batch or 1, heads or 1, tokens or 1, keys]. The probability of dropout is rounded to a multiple of
    2^-16, and what is kept is scaled by just that. The mask is drawn from torch's generator, and depends on the shapes
    alone besides.
    """
    keep = min(_VALUES - 1, round((1 - dropout) * _VALUES))
    output: torch.Tensor = _Attention.apply(query, key, value, bias, scale, keep)
    return output


def _chunks(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield samples with some of their heads."""
    num_heads = max(1, _CHUNK // (query.shape[2] * key.shape[2]))
    for sample in range(query.shape[0]):
        for first in range(0, query.shape[1], num_heads):
            yield sample, slice(first, min(first + num_heads, query.shape[1]))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        keep: int,
    ) -> torch.Tensor:
        bias = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
        kept = torch.empty(*query.shape[:3], key.shape[2], dtype=torch.uint8)
        output = torch.empty(*query.shape[:3], value.shape[-1])
        for place in _chunks(query, key):
            mask = _draw(kept[place], keep)
            dropped = _probabilities(query[place], key[place], bias, place, scale).mul_(mask)
            torch.bmm(dropped, value[place], out=output[place])
        ctx.save_for_backward(query, key, value, kept)
        ctx.bias, ctx.scale, ctx.unkeep = bias, scale, _VALUES / keep
        return output.mul_(ctx.unkeep)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # for gradients of these gradients: by operations that have some
            scores = ctx.scale * query @ key.transpose(2, 3)
            probabilities = (scores if ctx.bias is None else scores + ctx.bias).softmax(-1)
            output = ctx.unkeep * (probabilities * kept) @ value
            return *torch.autograd.grad(output, (query, key, value), gradient, create_graph=True), None, None, None
        gradient = gradient * ctx.unkeep
        by_query, by_key, by_value = (torch.empty(each.shape) for each in (query, key, value))
        for place in _chunks(query, key):
            mask = kept[place].float()
            probabilities = _probabilities(query[place], key[place], ctx.bias, place, ctx.scale)
            by_probability = torch.bmm(gradient[place], value[place].transpose(1, 2)).mul_(mask)
            by_score = torch._softmax_backward_data(by_probability, probabilities, -1, torch.float32)
            torch.bmm(probabilities.mul_(mask).transpose(1, 2), gradient[place], out=by_value[place])
            torch.bmm(by_score, key[place], out=by_query[place])
            torch.bmm(by_score.transpose(1, 2), query[place], out=by_key[place])
        return by_query.mul_(ctx.scale), by_key.mul_(ctx.scale), by_value, None, None, None


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, place: tuple[int, slice], scale: float
) -> torch.Tensor:
    scores = torch.bmm(query * scale, key.transpose(1, 2))
    if bias is not None:
        scores.add_(bias[place])
    return torch.softmax(scores, -1, out=scores)


def _draw(kept: torch.Tensor, keep: int) -> torch.Tensor:
    """Set `kept` to 1 with probability `keep` / 2^16, else 0; return that in fp32."""
    numbers = torch.empty(-(-kept.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    mask = numbers.view(torch.int16)[: kept.numel()].lt_(keep - _VALUES // 2).view(kept.shape)
    kept.copy_(mask)
    return mask.float()

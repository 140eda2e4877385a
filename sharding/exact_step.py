"""An optimizer's step whose bits do not depend on how tensors are divided.

Kernels that do several operations at once (a multiplication and an addition, say) round otherwise at the ends of a
tensor, where they do not fill a vector, and at the ends of each thread's part. Single operations are correctly rounded
everywhere. So those are what a step is made of here, in pieces that stay in the cache. A fused kernel, which is faster,
fills its vectors: what is left of each tensor gets a vector of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardlaunch.errors import UserError

_CHUNK = 1 << 15  # elements, on the CPU
_FULL = 64  # a multiple of the elements of a vector, and of what a thread of a fused kernel gets
_aten = torch.ops.aten


def step_exactly(optimizer: torch.optim.Optimizer) -> None:
    """Do a step of an elementwise optimizer. Raises UserError for operations that are not known to be exact."""
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = False
    with _Exactly(type(optimizer).__name__):
        optimizer.step()


class _Exactly(TorchDispatchMode):
    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOUND:
            return _COMPOUND[func](*args, **kwargs)
        if func in _FUSED:
            return _fused(func, *args, **kwargs)
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _ADDING and kwargs.get("alpha", 1) != 1:
            return _added(func, *args, **kwargs)
        if name not in _EXACT and func is not _aten._foreach_add_.Scalar:
            raise UserError(
                f"--exact: {self._who} uses {name}(), whose bits may depend on how a tensor is divided among ranks; "
                f"use another optimizer, such as AdamW or SGD"
            )
        return func(*args, **kwargs)


_ADDING = ("add", "add_", "sub", "sub_")
_EXACT = {
    *_ADDING,
    *("mul", "mul_", "div", "div_", "sqrt", "sqrt_", "neg", "neg_", "abs", "abs_", "sign", "sign_", "square"),
    *("reciprocal", "reciprocal_"),
    *("maximum", "minimum", "max", "min", "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_not"),
    *("where", "masked_fill", "masked_fill_", "index_put_"),
    *("copy_", "fill_", "zero_", "clone", "detach", "_to_copy", "lift_fresh", "view", "reshape", "_unsafe_view"),
    *("empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "scalar_tensor"),
    *("_local_scalar_dense", "alias", "t", "transpose", "expand", "view_as_real", "slice", "select", "unsqueeze"),
}


def _in_pieces(target: torch.Tensor, others: tuple[torch.Tensor, ...], change: Callable[..., None]) -> torch.Tensor:
    """Call `change` with flat pieces of a tensor, to be changed, and of others of its shape. Returns the tensor."""
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (target, *others)]
    mine, *rest = locals_
    if not all(tensor.is_contiguous() and tensor.shape == mine.shape for tensor in locals_):
        change(mine, *rest)
        return target
    size = _CHUNK if mine.device.type == "cpu" else max(1, mine.numel())
    for pieces in zip(*(tensor.view(-1).split(size) for tensor in locals_), strict=True):
        change(*pieces)
    return target


def lerp_exactly(target: torch.Tensor, end: torch.Tensor, weight: float) -> torch.Tensor:
    """Move a tensor towards another one, by `weight` of the way."""
    return _in_pieces(target, (end,), lambda mine, other: mine.add_((other - mine).mul_(weight)))


def _addcmul_(target: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *, value: float = 1) -> torch.Tensor:
    return _in_pieces(target, (one, other), lambda mine, a, b: mine.add_((a * b).mul_(value)))


def _addcdiv_(target: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *, value: float = 1) -> torch.Tensor:
    return _in_pieces(target, (one, other), lambda mine, a, b: mine.add_((a / b).mul_(value)))


def _added(func: Any, target: torch.Tensor, other: Any, *, alpha: float) -> torch.Tensor:
    """Add or subtract a multiple."""
    if func._schema.name.endswith("_") and isinstance(other, torch.Tensor):
        sign = -1 if "sub" in func._schema.name else 1
        return _in_pieces(target, (other,), lambda mine, its: mine.add_(its * (sign * alpha)))
    result: torch.Tensor = func(target, other * alpha)
    return result


def _fused(func: Any, *lists: Sequence[torch.Tensor], **settings: Any) -> None:
    """Call a kernel for lists of tensors, parameters and what belongs to them, with full vectors only."""
    names = [argument.name for argument in func._schema.arguments]
    steps = lists[names.index("state_steps")] if "state_steps" in names else None
    full: list[list[torch.Tensor]] = [[] for _ in lists]
    padded: list[list[torch.Tensor]] = [[] for _ in lists]
    rests: list[tuple[torch.Tensor, torch.Tensor]] = []
    for place, tensors in enumerate(lists):
        if tensors is steps:
            full[place], padded[place] = list(tensors), list(tensors)
            continue
        for tensor in tensors:
            flat = _flat(tensor)
            cut = len(flat) - len(flat) % _FULL
            rest = flat.new_zeros(_FULL)
            rest[: len(flat) - cut] = flat[cut:]
            full[place].append(flat[:cut])
            padded[place].append(rest)
            rests.append((flat[cut:], rest))
    func(*full, **settings)
    func(*padded, **settings)
    for flat, rest in rests:
        flat.copy_(rest[: len(flat)])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor that this rank has, in their order in memory."""
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return mine.detach().as_strided((mine.numel(),), (1,))


_FUSED = (
    _aten._fused_adam_.default,
    _aten._fused_adamw_.default,
    _aten._fused_sgd_.default,
    _aten._fused_adagrad_.default,
)
_COMPOUND: dict[Any, Callable[..., torch.Tensor]] = {
    _aten.lerp_.Scalar: lerp_exactly,
    _aten.addcmul_.default: _addcmul_,
    _aten.addcdiv_.default: _addcdiv_,
}

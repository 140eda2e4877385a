"""Tensor parallelism: linear layers and embeddings are divided over the ranks of a model group, as the plan says.

The plan is transformers' (`tp_plan` of a model: names of modules, with `*` for numbers, and a style each), or an
attribute of the same name of one's own module. Between a `colwise` and a `rowwise` layer each rank has its own features
(heads, say); everything else is the same on all ranks of the group, to the bit.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.sharding.parts import Part

_Function = Callable[[torch.Tensor, Part], torch.Tensor]
_FLAG = "--tensor-parallel"
_COLWISE, _GATHERED, _ROWWISE, _SPLIT, _EMBEDDING, _PARTIAL, _WHOLE = STYLES = (
    "colwise",
    "colwise_gather_output",
    "rowwise",
    "rowwise_split_input",
    "embedding_rowwise",
    "replicated_with_grad_allreduce",
    "replicate",
)
# Those that take and return whole features, so that they may as well be left whole.
_CLOSED = (_GATHERED, _EMBEDDING)
# Plans that transformers does not have. Fused queries, keys and values are gathered, since a range of them is no heads.
_PLANS = {
    "GPT2LMHeadModel": {
        "transformer.wte": _EMBEDDING,
        "transformer.h.*.attn.c_attn": _GATHERED,
        "transformer.h.*.attn.c_proj": _SPLIT,
        "transformer.h.*.mlp.c_fc": _COLWISE,
        "transformer.h.*.mlp.c_proj": _ROWWISE,
        "lm_head": _GATHERED,
    }
}


def divide(model: nn.Module, *, index: int, count: int, group: dist.ProcessGroup) -> dict[str, Part]:
    """Leave to each layer of the plan its part for rank `index` of `count`; return the parts of all parameters by name.

    Values are not kept. Raises UserError where there is no plan, or it cannot be followed.
    """
    styles = _styles(model, count)
    parts: dict[int, Part] = {}
    whole = Part(None, index, count, group)
    divided: dict[int, nn.Parameter] = {}
    for name, style in styles.items():
        module = model.get_submodule(name)
        if style == _PARTIAL:
            for parameter in module.parameters():
                parts[id(parameter)] = replace(whole, has_partial_gradient=True)
            continue
        for own_name, dim in _dims(module, style).items():
            old = module.get_parameter(own_name)
            if id(old) not in divided:
                shape = [size // count if i == dim else size for i, size in enumerate(old.shape)]
                new = torch.empty(shape, dtype=old.dtype, device=old.device)
                divided[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
                parts[id(divided[id(old)])] = replace(whole, dim=dim)
            setattr(module, own_name, divided[id(old)])
        module.forward = partial(_FORWARDS[style], module, whole)
    return {name: parts.get(id(parameter), whole) for name, parameter in model.named_parameters()}


def _styles(model: nn.Module, count: int) -> dict[str, str]:
    """Return the style of each module that is divided. Raises UserError where that is not possible."""
    plan = list(_plan(model))
    if not plan:
        raise UserError(
            f"{_FLAG} {count}: {type(model).__name__} does not say what to divide: it has no tp_plan, as those models "
            f"of transformers have that can be divided. Remove {_FLAG}"
        )
    unknown = sorted({style for _, style in plan if style not in STYLES})
    if unknown:
        raise UserError(
            f"{_FLAG} {count}: the plan of {type(model).__name__} has {some(unknown)}, which is not supported; "
            f"supported: {', '.join(STYLES)}. Remove {_FLAG}"
        )
    styles = {
        name: style
        for name, _ in model.named_modules()
        for pattern, style in plan
        if style != _WHOLE and pattern.fullmatch(name)
    }
    for name, style in styles.items():
        _check(model, name, style, count)
    ties = _ties(model)
    return {
        name: style
        for name, style in styles.items()
        if style not in _CLOSED or all(_is_divisible(model, tied, styles.get(tied), count) for tied in ties[name])
    }


def _plan(model: nn.Module) -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield the entries of the outermost plans in the model, with patterns of full names."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside):
            continue
        plan = getattr(module, "tp_plan", None) or _PLANS.get(type(module).__name__)
        if isinstance(plan, Mapping) and plan:
            prefix = f"{name}." if name else ""
            inside.append(prefix)
            for name_of_many, style in plan.items():
                yield re.compile(re.escape(f"{prefix}{name_of_many}").replace(r"\*", r"\d+")), style


def _check(model: nn.Module, name: str, style: str, count: int) -> None:
    """Raise UserError for a module that cannot be divided."""
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    if style == _PARTIAL:
        return
    if style in _CLOSED:
        return
    if not _is_plain(module, style):
        raise UserError(f"{_FLAG} {count}: {name} is a {type(module).__name__}, which cannot be divided as {style}")
    if _size(module, style) % count:
        raise UserError(
            f"{_FLAG} {count}: {name} has {_size(module, style)} features, which {count} ranks cannot share evenly"
        )
    head_dim = getattr(parent, "head_dim", None)
    if style == _COLWISE and isinstance(head_dim, int) and _size(module, style) // count % head_dim:
        heads = _size(module, style) // head_dim
        raise UserError(f"{_FLAG} {count}: {name} has {heads} heads, which {count} ranks cannot share evenly")
    rates = {
        key: rate
        for key, value in (*vars(parent).items(), *parent.named_children())
        if "dropout" in key and "att" in key and isinstance(rate := getattr(value, "p", value), float) and rate
    }
    if style == _COLWISE and rates:
        raise UserError(
            f"{_FLAG} {count}: {name.rpartition('.')[0]} has {some([f'{key}={rate}' for key, rate in rates.items()])}. "
            f"Each rank would draw for its own heads alone, which would make the run depend on their number; set it "
            f"to 0 in config.json"
        )


def _is_divisible(model: nn.Module, name: str, style: str | None, count: int) -> bool:
    module = model.get_submodule(name)
    return style is not None and _is_plain(module, style) and _size(module, style) % count == 0


def _is_plain(module: nn.Module, style: str) -> bool:
    """Return whether a module does nothing but what its class in torch, or GPT-2's, does."""
    if style == _EMBEDDING:
        is_odd = any(getattr(module, name, None) for name in ("max_norm", "scale_grad_by_freq", "sparse"))
        return type(module).forward is nn.Embedding.forward and not is_odd
    return type(module).forward in (nn.Linear.forward, _conv1d().forward)


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """Return the modules that share a parameter with each module, itself among them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    ties: dict[str, list[str]] = {name: [] for name, _ in model.named_modules()}
    for names in owners.values():
        for name in names:
            ties[name] += names
    return ties


def _dims(module: nn.Module, style: str) -> dict[str, int]:
    """Return the dimension that is divided of each parameter that is."""
    is_rowwise = style in (_ROWWISE, _SPLIT)
    dims = {"weight": int(is_rowwise != isinstance(module, _conv1d()))}
    if style in (_COLWISE, _GATHERED) and getattr(module, "bias", None) is not None:
        dims["bias"] = 0
    return {**dims, "weight": 0} if style == _EMBEDDING else dims


def _size(module: nn.Module, style: str) -> int:
    return int(module.get_parameter("weight").shape[_dims(module, style)["weight"]])


def _conv1d() -> type[nn.Module]:
    """Return the linear layer of GPT-2 in transformers, whose weight is that of nn.Linear transposed."""
    from transformers.pytorch_utils import Conv1D

    found: type[nn.Module] = Conv1D
    return found


def _colwise(module: nn.Module, part: Part, inputs: torch.Tensor, *, gather: bool = False) -> torch.Tensor:
    outputs = _product(module, _paired(inputs, _same, _summed, part))  # equal on all ranks, each of which uses it
    bias = getattr(module, "bias", None)
    outputs = outputs if bias is None else outputs + bias
    return _paired(outputs, _gathered, _own, part) if gather else outputs


def _rowwise(module: nn.Module, part: Part, inputs: torch.Tensor, *, split: bool = False) -> torch.Tensor:
    own = _paired(inputs, _own, _gathered, part) if split else inputs
    outputs = _paired(_product(module, own), _summed, _same, part)  # each has the gradient of the sum already
    bias = getattr(module, "bias", None)
    return outputs if bias is None else outputs + bias


def _embedding(module: nn.Embedding, part: Part, tokens: torch.Tensor) -> torch.Tensor:
    size = len(module.weight)
    own = tokens - part.number * size
    is_here = (own >= 0) & (own < size)
    padding = module.padding_idx
    has_padding = padding is not None and 0 <= padding - part.number * size < size
    padding_idx = padding - part.number * size if padding is not None and has_padding else None
    vectors = F.embedding(own.where(is_here, 0), module.weight, padding_idx)
    return _paired(vectors * is_here.unsqueeze(-1), _summed, _same, part)


def _product(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    weight = module.get_parameter("weight")
    return inputs @ weight if isinstance(module, _conv1d()) else F.linear(inputs, weight)


_FORWARDS: dict[str, Callable[..., torch.Tensor]] = {
    _COLWISE: _colwise,
    _GATHERED: partial(_colwise, gather=True),
    _ROWWISE: _rowwise,
    _SPLIT: partial(_rowwise, split=True),
    _EMBEDDING: _embedding,
}


class _Paired(torch.autograd.Function):
    """A function of what this rank has, and another one of the gradient of its result."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, there: _Function, back: _Function, part: Part) -> torch.Tensor:
        ctx.back, ctx.part = back, part
        return there(inputs, part)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(gradients[0], ctx.part), None, None, None


def _paired(inputs: torch.Tensor, there: _Function, back: _Function, part: Part) -> torch.Tensor:
    result: torch.Tensor = _Paired.apply(inputs, there, back, part)
    return result


def _same(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor.view_as(tensor)


def _summed(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=part.group)
    return total


def _gathered(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    tensor = tensor.contiguous()
    everyone = [torch.empty_like(tensor) for _ in range(part.num_parts)]
    dist.all_gather(everyone, tensor, group=part.group)
    return torch.cat(everyone, dim=-1)


def _own(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor.chunk(part.num_parts, dim=-1)[part.number].contiguous()

"""The loss of a language model inside its output layer, some tokens at a time, so that no logits are kept.

The logits of a micro-batch are its tokens times the vocabulary, in fp32, several times over: often more memory than all
other activations. PyTorch's `linear_cross_entropy` computes those of some tokens, their loss and gradients, and goes on
to the next. The layer itself calls it, in the model's forward pass, since that is where sharded weights are gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

from shardlaunch.errors import UserError
from shardlaunch.launcher.toolkit.packing import NO_TARGET

TOKENS_AT_ONCE = 256
"""On CPU, where torch's own choice has the weights' gradient go through memory too often. On GPUs that choice holds."""
PROBED_TOKENS = 8
PROBE = 1000.0  # more than any logit, so that capping changes it too
_FLAG = "--chunked-loss"

_targets: ContextVar[torch.Tensor | None] = ContextVar("_targets", default=None)
_is_probed: ContextVar[bool] = ContextVar("_is_probed", default=False)


class LossHead(nn.Linear):
    """An output layer that returns the sum of the losses of the tokens' targets, where these are given."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        targets = _targets.get()
        if _is_probed.get():
            return _probe(hidden, self.weight.shape[0])
        if targets is None:
            return super().forward(hidden)
        # In fp32 under autocast too: the sum has the dtype of the states, and so have the gradients, which are computed
        # with it, before the loss is scaled.
        states = hidden.flatten(0, -2).float()
        at_once = min(TOKENS_AT_ONCE, len(states)) if states.device.type == "cpu" else None
        return linear_cross_entropy(
            states,
            self.weight.float(),
            targets.flatten(),
            linear_bias=self.bias.float() if self.bias is not None else None,
            reduction="sum",
            ignore_index=NO_TARGET,
            options=LinearCrossEntropyOptions(batch_chunk_size=at_once),
        )


def prepare_head(model: Any) -> None:
    """Let the output layer of a transformers causal language model compute losses: `sum_of_losses`.

    Raises UserError when it is not a plain linear layer.
    """
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        what = f"is a {type(head).__name__}" if head is not None else "is not known"
        raise UserError(f"{_FLAG}: needs a linear output layer, and that of {type(model).__name__} {what}; remove it")
    head.__class__ = LossHead


def sum_of_losses(model: Any, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses of all targets but -100, computed in fp32 inside the output layer: a scalar.

    `targets`: ids, of shape (rows, tokens), one per position: not shifted. `inputs`: arguments of the model, each of
    shape (rows, tokens). Raises UserError when the model does not return what its output layer does.
    """
    with _set(_targets, targets):
        loss: torch.Tensor = model(**inputs, use_cache=False).logits
    if loss.ndim:
        raise UserError(f"{_FLAG}: the output layer of this model is replaced or not called; remove {_FLAG}")
    return loss


def require_logits_of_head(model: Any, **inputs: torch.Tensor) -> None:
    """Raise UserError when a model changes what its output layer returns, as by a cap, a factor or an adapter.

    Runs it on the first tokens, without a trace in the generators. All ranks of a sharded model.
    """
    first = {name: tensor[:1, :PROBED_TOKENS] for name, tensor in inputs.items()}
    device = first["input_ids"].device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), _set(_is_probed, True):
        logits = model(**first, use_cache=False).logits
    if is_fake(logits):  # of a plan, which knows no values
        return
    if not torch.equal(logits.float(), _probe(first["input_ids"][..., None], logits.shape[-1])):
        raise UserError(
            f"{_FLAG}: this model changes the logits after its output layer (by a cap or a factor, or an adapter "
            f"does), which the loss inside that layer would miss; remove {_FLAG}"
        )


def _probe(hidden: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return values as logits, of any size and both signs, that each dtype can hold."""
    signs = 1 - 2 * (torch.arange(num_classes, device=hidden.device) % 2)
    return (PROBE * signs).float().expand(*hidden.shape[:-1], num_classes)


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)

"""Values that a recipe logs beside its loss: sums and counts by name."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from shardlaunch.errors import UserError, printable

MOST_NAMES = 1000
_RESERVED = ("loss", "step", "epoch")
"""Names that a line of an evaluation has already."""

Logged = dict[str, list[tuple[Any, Any]]]
"""Sums and counts by name: numbers, or tensors of one number on a device whose values are not waited for."""


class Logs:
    """Takes what is logged while `collecting`, and refuses it otherwise."""

    _logged: Logged | None = None

    def log(self, name: str, total: Any, count: Any = None, **unknown: Any) -> None:
        """Log a value beside the loss: a sum over some of the batch, and the number of what it is a sum over.

        To be called in `forward`, `loss` and `update_metrics`. Sums and counts are added over the micro-batches and
        ranks, as the loss is; the sum divided by the count is `train/NAME` in metrics.jsonl and the trackers, or, in an
        evaluation, `eval/NAME`. A name may be logged by some micro-batches only. Costs no wait for the device. Raises
        UserError for what is no number, and elsewhere.
        """
        if self._logged is None:
            raise UserError(
                f"self.log({name!r}, ...): can be called in forward(), loss() and update_metrics(), where what is "
                f"logged is summed over micro-batches and ranks, and nowhere else"
            )
        if count is None or unknown:
            raise UserError(
                f"self.log({name!r}, ...): takes a sum and the number of what it is a sum over, as in "
                f'self.log("kl", kl.sum(), len(kl)), so that the value is the same on any ranks'
                + (f"; it does not take {', '.join(unknown)}" if unknown else "")
            )
        _check_name(name, self._logged)
        self._logged.setdefault(name, []).append((_number(name, total, "sum"), _number(name, count, "count")))


@contextmanager
def collecting(recipe: Logs) -> Iterator[Logged]:
    """Yield what a recipe logs within."""
    found: Logged = {}
    recipe._logged = found
    try:
        yield found
    finally:
        recipe._logged = None


def _check_name(name: Any, known: Logged) -> None:
    if not isinstance(name, str) or not name.strip() or printable(name, is_name=True) != name or name in _RESERVED:
        taken = "; it is taken" if name in _RESERVED else ""
        raise UserError(f"self.log({name!r}, ...): is no name for a value{taken}. Use a short text, such as 'kl'")
    if len(known) >= MOST_NAMES and name not in known:
        raise UserError(
            f"self.log({name!r}, ...): more than {MOST_NAMES} names. Log few values under fixed names, not one per "
            f"sample or step"
        )


def _number(name: str, value: Any, what: str) -> Any:
    """Return a number as float, but a tensor on another device as it is."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or hasattr(value, "full_tensor"):
            shape = f"a tensor of shape {list(value.shape)}" + (", in shards" if hasattr(value, "full_tensor") else "")
            raise UserError(f"self.log({name!r}, ...): the {what} must be one real number, not {shape}")
        value = value.detach()
        if value.device.type != "cpu":
            return value.reshape(())
    elif isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"self.log({name!r}, ...): the {what} must be one number, not {value!r}") from None
    if what == "count" and not 0 <= number < math.inf:
        raise UserError(f"self.log({name!r}, ...): the count must be a number from 0, not {number}")
    return number

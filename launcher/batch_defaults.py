"""Default collate(), forward() and num_targets() of recipes, for rows that are (inputs, labels) or dictionaries."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import default_collate

from shardlaunch.errors import UserError, some

IGNORED = -100
"""The label that torch's losses ignore (`ignore_index` of cross_entropy)."""
NOT_FOR_THE_MODEL = ("labels", "label", "length")
"""Columns of a batch that are used for the loss, or for batching samples of similar length."""
_WHAT_A_BATCH_IS = (
    "collate(samples, seeds) returns a batch: tensors by name. The default collate() supports rows that are "
    "(inputs, labels) or dictionaries, with numbers, arrays or tensors of equal shape as values"
)


class InputsLabels(NamedTuple):
    """A batch of (inputs, labels) rows. `batch["inputs"]`, `batch[0]` and `inputs, labels = batch` all work."""

    inputs: Any
    labels: Any

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        if key not in self._fields:
            raise KeyError(key)
        return getattr(self, key)


def collated(rows: Sequence[Any]) -> Any:
    """Return a batch of rows: `InputsLabels` for pairs, a dictionary for dictionaries, else as `default_collate`.

    Raises UserError for rows that cannot be collated.
    """
    first = rows[0]
    is_plain = isinstance(first, tuple | list) and not hasattr(first, "_fields")
    if is_plain and len(first) != 2:
        values = f"{len(first)} value{'s' * (len(first) != 1)}, {_kinds(first)}"
        raise UserError(
            f"the rows of the data set have {values}; it is unclear which are inputs and labels. "
            f"{_WHAT_A_BATCH_IS}; for others define collate(): `return default_collate(samples)` (of torch.utils.data) "
            f"returns a list, which your own forward(), loss() and num_targets() can take"
        )
    try:
        batch = default_collate(list(rows))
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the rows of the data set cannot be collated ({type(error).__name__}: {_first_line(error)}); the first is "
            f"{_kinds(first)}. {_WHAT_A_BATCH_IS}; turn images into tensors and text into token ids, pad rows of "
            f"different lengths, or define collate()"
        ) from error
    if is_plain and len(batch) == 2:
        batch = InputsLabels(*batch)
        for name, column in zip(InputsLabels._fields, batch, strict=True):
            if _is_text(column):
                raise UserError(f"the {name} in the data set's rows are text. {_WHAT_A_BATCH_IS}; define collate()")
    return batch


def model_outputs(model: nn.Module, batch: Any) -> Any:
    """Call the model with the batch's `inputs` or, without them, its columns by name, as transformers' models expect.

    Labels are not passed: the recipe computes the loss. Raises UserError for columns that the model does not accept,
    and for a batch without columns.
    """
    if has_column(batch, "inputs"):
        if _is_text(batch["inputs"]):
            raise UserError(f"the batch's inputs are text. {_WHAT_A_BATCH_IS}; define collate()")
        return model(batch["inputs"])
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    columns = [name for name in batch if name not in NOT_FOR_THE_MODEL] if isinstance(batch, Mapping) else []
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [name for name in columns if name not in names and not takes_any]
    if not columns or unknown or not set(columns) & set(names):
        what = f"and {type(model).__name__}.forward() has no {some(map(repr, unknown or columns))}" if columns else ""
        raise UserError(
            f"the batch has no 'inputs' ({_columns(batch)}) {what}".rstrip()
            + ": name the columns like the model's arguments, remove others in collate(), or define forward()"
        )
    return model(**{name: batch[name] for name in columns})


def count_targets(batch: Any) -> int:
    """Return the number of targets in the batch's `labels`.

    Integer labels: all that are not -100, which torch's losses ignore. Other labels: one per row, each a single number.
    Raises UserError if labels are missing, text, or several non-integer numbers per row.
    """
    if not has_column(batch, "labels"):
        raise UserError(
            f"the batch has no 'labels' to count ({_columns(batch)}): rename them in the data set or in collate(), or "
            f"define num_targets() and loss()"
        )
    labels = batch["labels"]
    if not isinstance(labels, torch.Tensor):
        if _is_text(labels):
            raise UserError(f"the batch's labels are text. {_WHAT_A_BATCH_IS}; convert them to numbers in collate()")
        return len(labels)
    if not labels.dtype.is_floating_point and not labels.dtype.is_complex and labels.dtype != torch.bool:
        return int((labels != IGNORED).sum())
    if labels.numel() != len(labels):
        raise UserError(
            f"labels of shape {list(labels.shape)} and {labels.dtype} may be counted per row or per number: define "
            f'num_targets() to return the number that the loss is divided by, such as `len(batch["labels"])` or '
            f'`batch["labels"].numel()`'
        )
    return len(labels)


def has_column(batch: Any, name: str) -> bool:
    """Return whether a batch, a mapping or a named tuple, has a column of this name."""
    return name in batch if isinstance(batch, Mapping) else hasattr(batch, "_fields") and name in batch._fields


def _columns(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"it has {some(map(repr, batch))}" if batch else "it is empty"
    return f"it is a {type(batch).__name__}"


def _is_text(column: Any) -> bool:
    return isinstance(column, list | tuple) and len(column) > 0 and isinstance(column[0], str | bytes)


def _kinds(row: Any) -> str:
    """Describe a row's values by type and shape."""
    if isinstance(row, Mapping):
        return "{" + some(f"{name!r}: {_kinds(value)}" for name, value in row.items()) + "}"
    if isinstance(row, tuple | list):
        return f"({some(map(_kinds, row))})"
    shape = getattr(row, "shape", None)
    return type(row).__name__ + (f" {list(shape)}" if isinstance(shape, tuple) and shape else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

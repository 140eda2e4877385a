"""What a recipe's `step` is written against."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Loss = torch.Tensor | Mapping[str, torch.Tensor]
"""The sum of a loss over the targets of a micro-batch, or several such sums by name."""
LossOf = Callable[[nn.Module, Any], Loss]
"""Returns the loss of a micro-batch: called with the model and the batch."""
LossOfRows = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], int], Loss]
"""Returns the loss of a micro-batch's rows, beside those of the whole global batch: called with both, and the place of
the first of its rows."""
Embed = Callable[[nn.Module, Any], torch.Tensor | Sequence[torch.Tensor]]
"""Returns the rows of a micro-batch: tensors with one entry per row."""


class Step(ABC):
    """One step of the run: updates of the model from one global batch, whose micro-batches the ranks divide.

    All ranks must make the same updates in the same order. What may decide on them is the same everywhere:
    `Recipe.moment`, options, and what `update` returns.
    """

    @abstractmethod
    def update(
        self, loss: LossOf | LossOfRows | None = None, *, optimizer: str = "", embed: Embed | None = None
    ) -> float:
        """Update once from the gradient of a loss over the global batch, and return its value. All ranks.

        `loss(model, batch)` is called for each micro-batch and returns the sum over its targets, which is divided by
        the targets of the whole global batch (`num_targets`); or several sums by name, each divided by its own number
        if `num_targets` returns numbers by name. None: `forward` and `loss` of the recipe. Only the parameters of
        `optimizer`, one of the names that `Recipe.optimizer` returns, get a gradient and are updated; others need none.

        With `embed`, the loss is one of rows that are compared over the whole global batch. `embed(model, batch)`
        returns the rows of a micro-batch, one tensor or several (of floats, with gradients, or integers). Then
        `loss(rows, all_rows, first)` returns the sum for its rows: `rows[i]` are `all_rows[i][first : first + n]`.
        The model runs twice, at first without a graph, so that memory is needed for the graph of one micro-batch.

        Random numbers follow from seed, step, number of the update and micro-batch. The gradient is clipped and
        judged, and an update skipped, as `--max-grad-norm` and `--on-nonfinite` say. Raises UserError.
        """

    @abstractmethod
    def gradient_of(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the sum of `outputs` with respect to `inputs`, for a loss that contains it.

        As `torch.autograd.grad(outputs.sum(), inputs, create_graph=True)`, also where weights are in shards. Raises
        UserError under a strategy that cannot.
        """

"""Metrics of answers that are spans of a context, whose windows may be on several ranks.

Their base class takes long to import: import this module where a metric is built.
"""

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class SpanScore(Metric):
    """The mean over questions of a score of their answer: that of the window whose best span scores highest.

    With `can_be_empty` the answer is none where that scores higher, in the window where it scores least, as SQuAD's
    evaluation has it.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    rows: list[torch.Tensor]
    values: list[torch.Tensor]

    def __init__(self, *, can_be_empty: bool) -> None:
        super().__init__()
        self._can_be_empty = can_be_empty
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add windows: numbers of their questions (int64), and [windows, 4] in float64.

        Of a window: the logit of its best span, that of no answer, and the scores of these two answers.
        """
        self.rows.append(rows)
        self.values.append(values)

    def compute(self) -> torch.Tensor:
        """Return the mean (float64)."""
        rows, values = dim_zero_cat(self.rows), dim_zero_cat(self.values)
        # Windows are put in an order that does not depend on which rank had them.
        for column in (2, 0):
            order = torch.argsort(values[:, column], descending=True, stable=True)
            rows, values = rows[order], values[order]
        order = torch.argsort(rows, stable=True)
        rows, values = rows[order], values[order]
        _, inverse = torch.unique_consecutive(rows, return_inverse=True)
        is_first = torch.cat((torch.ones_like(rows[:1]), (rows[1:] != rows[:-1]).long())).bool()
        best: torch.Tensor = values[is_first]
        if not self._can_be_empty:
            return best[:, 2].mean()
        least = torch.full_like(best[:, 1], torch.inf).scatter_reduce(0, inverse, values[:, 1], "amin")
        scores: torch.Tensor = torch.where(least > best[:, 0], best[:, 3], best[:, 2])
        return scores.mean()

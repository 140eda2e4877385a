"""Metrics of language models, from the sum of the loss over targets: exact, whatever the batches and ranks."""

import math
from typing import Any

import torch
from torchmetrics import Metric


class NatsPer(Metric):
    """Compute the cross-entropy a target or a unit of text: sums in float64, divided once."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.nats: Any
        self.count: Any

    def update(self, nats: torch.Tensor, count: torch.Tensor) -> None:
        """Add the sum of some targets' cross-entropy, and how many targets or units of text they are."""
        self.nats += nats
        self.count += count

    def compute(self) -> torch.Tensor:
        """Return nats a target or unit."""
        nats: torch.Tensor = self.nats / self.count
        return nats


class Perplexity(NatsPer):
    """Compute e to the mean cross-entropy of a target."""

    def compute(self) -> torch.Tensor:
        """Return the perplexity."""
        return super().compute().exp()


class BitsPer(NatsPer):
    """Compute the cross-entropy in bits a unit of text."""

    def compute(self) -> torch.Tensor:
        """Return the bits a unit."""
        return super().compute() / math.log(2)

"""Perplexity and bits per unit do not depend on how targets are batched."""

import math

import pytest
import torch

from shardlaunch.metrics import BitsPer, Perplexity


def test_sums_over_uneven_batches() -> None:
    nats = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9
    for sizes in ([1000], [1, 700, 299]):
        perplexity, bits = Perplexity(), BitsPer()
        for part in nats.split(sizes):
            perplexity.update(part.sum(), len(part))
            bits.update(part.sum(), torch.tensor(3 * len(part)))
        assert perplexity.compute().item() == pytest.approx(math.exp(nats.mean().item()), rel=1e-12)
        assert bits.compute().item() == pytest.approx(nats.sum().item() / math.log(2) / 3000, rel=1e-12)
        assert perplexity.higher_is_better is False

"""Two towers that embed queries and documents: each query is compared with the documents of the whole global batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch


@dataclass(kw_only=True)
class TwoTowerOptions(Options):
    """Options of the two towers."""

    global_batch_size: int = 128
    micro_batch_size: int = 16
    dim: int = 32
    """Length of an embedding."""


class TwoTowers(nn.Module):
    """Two towers with dropout, and a temperature that is learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.queries = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, dim))
        self.documents = nn.Sequential(nn.Linear(30, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, dim))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, queries, documents):
        embedded = F.normalize(self.queries(queries), dim=-1), F.normalize(self.documents(documents), dim=-1)
        return embedded[0] * self.log_scale.exp(), embedded[1]


class TwoTowerRecipe(Recipe):
    """Find the document that was made from the same source as a query."""

    options: TwoTowerOptions
    loss_couples_samples = True  # in evaluation, a query is compared with its micro-batch

    def datasets(self):
        generator = torch.Generator().manual_seed(0)
        source = torch.randn(1200, 10, generator=generator)
        queries = torch.tanh(source @ torch.randn(10, 20, generator=generator))
        documents = torch.tanh(source @ torch.randn(10, 30, generator=generator))
        return {
            "train": TensorData(queries=queries[:1000], documents=documents[:1000]),
            "eval": TensorData(queries=queries[1000:], documents=documents[1000:]),
        }

    def model(self):
        return TwoTowers(self.options.dim)

    def num_targets(self, batch):
        return len(batch["queries"])

    def step(self, step):
        step.update(self._compare, embed=self.forward)

    def forward(self, model, batch):
        return model(batch["queries"], batch["documents"])

    def _compare(self, rows, all_rows, first):
        queries, documents = rows
        all_queries, all_documents = all_rows
        own = torch.arange(first, first + len(queries), device=queries.device)
        to_documents = F.cross_entropy(queries @ all_documents.T, own, reduction="sum")
        return (to_documents + F.cross_entropy(documents @ all_queries.T, own, reduction="sum")) / 2

    def loss(self, outputs, batch):
        return self._compare(outputs, outputs, 0)


if __name__ == "__main__":
    launch(TwoTowerRecipe)

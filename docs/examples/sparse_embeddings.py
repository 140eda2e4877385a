"""A recommender with sparse embeddings: each user likes a genre, as 3 to 20 items show; one more is to be found."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, launch, option

NUM_ITEMS, NUM_GENRES = 2000, 20


@dataclass(kw_only=True)
class RecommenderOptions(Options):
    """Options of the recommender."""

    lr: float = 0.1
    epochs: int = 15
    optimizer: str = "adagrad"
    sparse: bool = option(True, mark="warn")
    """Compute gradients of embeddings for the items of a batch only."""


class Recommender(nn.Module):
    """Scores of items beside the mean of a user's."""

    def __init__(self, dim: int, sparse: bool) -> None:
        super().__init__()
        self.liked = nn.EmbeddingBag(NUM_ITEMS, dim, sparse=sparse)
        self.items = nn.Embedding(NUM_ITEMS, dim, sparse=sparse)
        for table in (self.liked, self.items):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, liked, starts, candidates):
        return (self.items(candidates) @ self.liked(liked, starts).unsqueeze(2)).squeeze(2)


class RecommenderRecipe(Recipe):
    """Tell the item that a user likes from others."""

    options: RecommenderOptions

    def datasets(self):
        draw = torch.Generator().manual_seed(0)
        items = torch.randperm(NUM_ITEMS, generator=draw).reshape(NUM_GENRES, -1)
        rows = []
        for _ in range(5000):
            count = int(torch.randint(3, 21, (), generator=draw))
            genre = int(torch.randint(NUM_GENRES, (), generator=draw))
            rows.append(items[genre, torch.randint(items.shape[1], (count + 1,), generator=draw)])
        return {"train": rows[:4500], "eval": rows[4500:]}

    def model(self):
        return Recommender(32, self.options.sparse)

    def collate(self, samples, seeds):
        others = torch.randint(NUM_ITEMS, (len(samples), 9))
        return {
            "liked": torch.cat([row[:-1] for row in samples]),
            "starts": torch.tensor([0] + [len(row) - 1 for row in samples[:-1]]).cumsum(0),
            "candidates": torch.cat((torch.stack([row[-1:] for row in samples]), others), dim=1),
        }

    def num_targets(self, batch):
        return len(batch["starts"])

    def forward(self, model, batch):
        return model(**batch)

    def loss(self, outputs, batch):
        first = torch.zeros_like(outputs[:, 0], dtype=torch.long)
        self.log("first", (outputs.argmax(dim=1) == first).sum(), len(outputs))
        return F.cross_entropy(outputs, first, reduction="sum")


if __name__ == "__main__":
    launch(RecommenderRecipe)

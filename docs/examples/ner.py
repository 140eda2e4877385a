"""Named entities: one tag per word, of sentences made here; the names held out are new, so that only context tells."""

import random
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric

from shardlaunch import Recipe, launch

FRAMES = ["P went to L", "P met P in L", "the mayor of L is P", "in L people read P", "P likes L", "it rains"]
TAGS, NEW = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), 1  # word 0 is padding, word 1 one that is new


def sentences(count: int, first_name: int):
    draw = random.Random(first_name)
    for _ in range(count):
        words, tags = [], []
        for word in draw.choice(FRAMES).split():
            kind = {"P": 1, "L": 3}.get(word, 0)
            name = [f"Name{first_name + draw.randrange(500)}" for _ in range(draw.choice((1, 2)))]
            words, tags = words + (name if kind else [word]), tags + ([kind, kind + 1][: len(name)] if kind else [0])
        yield {"words": words, "tags": tags}


class EntityF1(Metric):
    """F1 of entities, which are right if kind, start and end are."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs, labels):
        for scores, tags in zip(outputs, labels, strict=True):
            texts = ("".join(map(str, row[tags != -100].tolist())) for row in (scores.argmax(dim=0), tags))
            found, wanted = ({(one[0][0], *one.span()) for one in re.finditer("12*|34*", text)} for text in texts)
            self.counts += torch.tensor([2 * len(found & wanted), len(found) + len(wanted)], device=self.device)

    def compute(self):
        return self.counts[0] / self.counts[1]


class NerRecipe(Recipe):
    """Find persons and places."""

    best_metric = "entity_f1"

    def datasets(self):
        train = list(sentences(3000, 0))
        known = sorted({word for row in train for word in row["words"]})
        self.ids = {word: number for number, word in enumerate(known, NEW + 1)}
        return {"train": train, "eval": list(sentences(500, 500))}

    def model(self):
        embedding = nn.Embedding(NEW + 1 + len(self.ids), 64, padding_idx=0)
        layers = nn.Conv2d(1, 64, (5, 64), padding=(2, 0)), nn.ReLU(), nn.Flatten(2), nn.Conv1d(64, len(TAGS), 1)
        return nn.Sequential(embedding, nn.Unflatten(0, (-1, 1)), *layers)

    def collate(self, samples, seeds):
        words = [torch.tensor([self.ids.get(word, NEW) for word in row["words"]]) for row in samples]
        known = 0.8 if seeds is not None else 1.0  # in training, some words are taken for new ones
        words = [ids.where(torch.rand(len(ids)) < known, NEW) for ids in words]
        tags = [torch.tensor(row["tags"]) for row in samples]
        return {"inputs": pad_sequence(words, True), "labels": pad_sequence(tags, True, -100)}

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return {"entity_f1": EntityF1()}


if __name__ == "__main__":
    launch(NerRecipe)

"""Metrics of tags of words: entities found, as seqeval counts them, and the share of right tags.

Counts are summed over the ranks, and divided once. Their base class takes long to import: import this module where a
metric is built.
"""

from collections.abc import Sequence

import torch
from torchmetrics import Metric

from shardlaunch.launcher.toolkit.tags import entities, split_tag


class TagCounts:
    """Counts of entities by type, and of words, given numbers of tags."""

    def __init__(self, tags: Sequence[str]) -> None:
        self._tags = [split_tag(tag) for tag in tags]
        self.types = sorted({kind for _, kind in self._tags if kind})

    def __call__(self, predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return int64 [types + 1, 3]: right, predicted and labelled entities of each type; of words in the last row.

        `predicted` and `labels` are numbers of tags, [rows, length]; labels below 0 are of no word.
        """
        counts = torch.zeros(len(self.types) + 1, 3, dtype=torch.int64)
        for row, its_labels in zip(predicted.tolist(), labels.tolist(), strict=True):
            pairs = [(one, label) for one, label in zip(row, its_labels, strict=True) if label >= 0]
            found = entities([self._tags[one] for one, _ in pairs])
            wanted = entities([self._tags[label] for _, label in pairs])
            for column, group in enumerate((found & wanted, found, wanted)):
                for kind, _, _ in group:
                    counts[self.types.index(kind), column] += 1
            counts[-1] += torch.tensor([sum(one == label for one, label in pairs), len(pairs), len(pairs)])
        return counts


class EntityScore(Metric):
    """Precision, recall or F1 of `TagCounts`: over all given rows of it together. 0 where there is nothing."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, kind: str, rows: Sequence[int]) -> None:
        super().__init__()
        self._kind = kind
        self._rows = list(rows)
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")
        self.counts: torch.Tensor

    def update(self, counts: torch.Tensor) -> None:
        """Add counts of `TagCounts`."""
        self.counts += counts[self._rows].sum(dim=0).to(self.counts.device)

    def compute(self) -> torch.Tensor:
        """Return the score, from 0 to 1 (float64)."""
        right, found, wanted = self.counts.double()
        divisor = {"precision": found, "recall": wanted, "f1": (found + wanted) / 2}[self._kind]
        return right / divisor if divisor > 0 else torch.zeros_like(right)


def tag_metrics(tags: Sequence[str]) -> tuple[TagCounts, dict[str, EntityScore]]:
    """Return what counts, and metrics of its counts by name: f1, precision, recall, f1_TYPE, accuracy (of words).

    Tags that mark no entities (parts of speech) have their accuracy only.
    """
    count = TagCounts(tags)
    every = range(len(count.types))
    metrics = {kind: EntityScore(kind, every) for kind in ("f1", "precision", "recall") if count.types}
    if len(count.types) > 1:
        metrics |= {f"f1_{kind}": EntityScore("f1", [number]) for number, kind in enumerate(count.types)}
    return count, {**metrics, "accuracy": EntityScore("precision", [len(count.types)])}

"""Metrics of retrieval: how well the texts that belong to an anchor are found among all others.

Their base class takes long to import: import this module where a metric is built.
"""

from collections.abc import Sequence

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

CHUNK = 256  # anchors that are compared with all texts at once


class Retrieval(Metric):
    """Recall, mean reciprocal rank (mrr) or nDCG of the first `k` texts, over all anchors of the evaluation.

    Each different text is a document once, and belongs to all anchors of the same text that it was given with. Vectors
    are gathered from all ranks, and put in the order of their texts' numbers.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    texts: list[torch.Tensor]
    vectors: list[torch.Tensor]

    def __init__(self, kind: str, k: int) -> None:
        super().__init__()
        self._kind, self._k = kind, k
        self.add_state("texts", [], dist_reduce_fx="cat")
        self.add_state("vectors", [], dist_reduce_fx="cat")

    def update(self, texts: torch.Tensor, vectors: Sequence[torch.Tensor]) -> None:
        """Add pairs: numbers of texts [pairs, roles], and the vectors of each role: anchors, positives, others."""
        self.texts.append(texts)
        self.vectors.append(torch.stack(tuple(vectors), dim=1).float())

    def compute(self) -> torch.Tensor:
        """Return the mean over all different anchors (float64)."""
        texts, vectors = dim_zero_cat(self.texts), dim_zero_cat(self.vectors)
        by_role = texts.T.contiguous()
        anchors, anchor_rows = _unique(by_role[0])
        documents, document_rows = _unique(by_role[1:].reshape(-1))
        queries = vectors[anchor_rows, 0]
        corpus = vectors[:, 1:].transpose(0, 1).flatten(0, 1)[document_rows]
        is_relevant = torch.zeros(len(anchors), len(documents), dtype=torch.bool, device=texts.device)
        is_relevant[torch.searchsorted(anchors, by_role[0]), torch.searchsorted(documents, by_role[1])] = True
        total = torch.zeros((), dtype=torch.float64, device=texts.device)
        for first in range(0, len(anchors), CHUNK):
            part = slice(first, first + CHUNK)
            best = (queries[part] @ corpus.T).argsort(dim=1, descending=True, stable=True)[:, : self._k]
            total += self._scores(is_relevant[part].gather(1, best), is_relevant[part].sum(dim=1)).sum()
        return total / len(anchors)

    def _scores(self, is_found: torch.Tensor, num_relevant: torch.Tensor) -> torch.Tensor:
        """Return a score per anchor (float64); `is_found` says which of its first texts belong to it."""
        places = torch.arange(1, is_found.shape[1] + 1, dtype=torch.float64, device=is_found.device)
        if self._kind == "recall":
            return is_found.sum(dim=1).double() / num_relevant
        if self._kind == "mrr":
            return (is_found / places).max(dim=1).values
        gains = 1 / torch.log2(places + 1)
        best = gains.cumsum(0)[num_relevant.clamp(max=len(places)) - 1]
        return (is_found * gains).sum(dim=1) / best


def _unique(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the different numbers in ascending order, and the first place of each."""
    values, inverse = torch.unique(numbers, return_inverse=True)
    places = torch.full_like(values, len(numbers))
    return values, places.scatter_reduce(0, inverse, torch.arange(len(numbers), device=numbers.device), "amin")


def retrieval_metrics() -> dict[str, Retrieval]:
    """Return metrics by name: ndcg_10, mrr_10, recall_1 and recall_10."""
    return {f"{kind}_{k}": Retrieval(kind, k) for kind, k in (("ndcg", 10), ("mrr", 10), ("recall", 1), ("recall", 10))}

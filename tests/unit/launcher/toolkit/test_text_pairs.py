"""Losses of pairs, computed by hand, and metrics of retrieval beside those of torchmetrics."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from shardlaunch.launcher.toolkit.retrieval_metrics import retrieval_metrics
from shardlaunch.launcher.toolkit.text_pairs import pooled, ranking_loss


def _vectors(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_loss_of_different_texts_is_cross_entropy() -> None:
    anchors, positives = _vectors(6, 4, seed=0), _vectors(6, 4, seed=1)
    texts = torch.arange(12).reshape(6, 2)
    everything = [texts, anchors, positives]
    parts = [[each[first : first + 2] for each in everything] for first in (0, 2, 4)]
    scores = anchors @ positives.T / 0.1
    to_positives = F.cross_entropy(scores, torch.arange(6), reduction="sum")
    to_anchors = F.cross_entropy(scores.T, torch.arange(6), reduction="sum")
    for both_ways, wanted in ((False, to_positives), (True, (to_positives + to_anchors) / 2)):
        found = [
            ranking_loss(part, everything, 2 * number, temperature=0.1, both_ways=both_ways)
            for number, part in enumerate(parts)
        ]
        torch.testing.assert_close(sum(found), wanted)


def test_the_same_text_is_no_negative() -> None:
    """Pairs 0 and 1 have the same positive, 2 and 3 the same anchor; the negative of pair 4 is the positive of 5."""
    texts = torch.tensor([[0, 50, 90], [1, 50, 91], [2, 52, 92], [2, 53, 93], [4, 54, 55], [5, 55, 95]])
    vectors = [_vectors(6, 4, seed=seed) for seed in range(3)]
    scores = torch.cat((vectors[0] @ vectors[1].T, vectors[0] @ vectors[2].T), dim=1)
    for row, column in ((0, 1), (1, 0), (2, 3), (3, 2), (5, 6 + 4)):
        scores[row, column] = -torch.inf
    wanted = F.cross_entropy(scores, torch.arange(6), reduction="sum")
    rows = [texts, *vectors]
    torch.testing.assert_close(ranking_loss(rows, rows, 0, temperature=1.0, both_ways=False), wanted)


def test_metrics_of_retrieval_are_those_of_torchmetrics() -> None:
    """Anchors and positives repeat: an anchor of two pairs has two texts to find, a text of two pairs stands once."""
    count = 40
    pairs = torch.randint(12, (count, 3), generator=torch.Generator().manual_seed(0)) + torch.tensor([0, 100, 200])
    of_text = {text: _vectors(5, seed=text) for text in pairs.flatten().tolist()}
    vectors = [torch.stack([of_text[text] for text in column]) for column in pairs.T.tolist()]
    metrics = retrieval_metrics()
    for metric in metrics.values():
        for first in range(0, count, 7):
            part = slice(first, first + 7)
            metric.update(pairs[part], [each[part] for each in vectors])
    documents = sorted({*pairs[:, 1:].flatten().tolist()})
    rows = []
    for query in sorted({*pairs[:, 0].tolist()}):
        wanted = {b for a, b, _ in pairs.tolist() if a == query}
        scored = [(float(of_text[query] @ of_text[text]), text in wanted) for text in documents]
        rows += [(query, 2 + score, is_wanted) for score, is_wanted in scored]  # torchmetrics takes none below 0
    queries, scores, is_wanted = (torch.tensor(column) for column in zip(*rows, strict=True))
    for name, known in (
        ("ndcg_10", RetrievalNormalizedDCG(top_k=10)),
        ("mrr_10", RetrievalMRR(top_k=10)),
        ("recall_1", RetrievalRecall(top_k=1)),
        ("recall_10", RetrievalRecall(top_k=10)),
    ):
        found = metrics[name].compute().item()
        assert found == pytest.approx(known(scores, is_wanted, indexes=queries).item(), abs=1e-6), name
        assert 0.01 < found < 0.99


def test_pooling_leaves_out_padding() -> None:
    states = _vectors(2, 3, 4, seed=0)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    mean = torch.stack((states[0, :2].mean(dim=0), states[1].mean(dim=0)))
    torch.testing.assert_close(pooled(states, mask, pooling="mean"), F.normalize(mean, dim=-1))
    torch.testing.assert_close(pooled(states, mask, pooling="cls"), states[:, 0])

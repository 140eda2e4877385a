"""Text metrics: BLEU and chrF by sacrebleu, ROUGE by rouge-score, perplexity, and bits per unit of text.

Their base class takes longer to import than torch, so this module is imported where a metric is built.

Metrics of generated texts take two lists, `update(hypotheses, references)`; scores are from 0 to 100. Every text counts
once, on any number of ranks.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from shardlaunch.errors import UserError

_END = b"\xff"  # end of a text: a byte that does not occur in UTF-8


class NatsPer(Metric):
    """Cross-entropy in nats per target or per unit of text: sums in float64, divided once."""

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
        """Add the summed cross-entropy of some targets, and their number of targets or units of text."""
        self.nats += nats
        self.count += count

    def compute(self) -> torch.Tensor:
        """Return the nats per target or unit (float64)."""
        nats: torch.Tensor = self.nats / self.count
        return nats


class Perplexity(NatsPer):
    """Perplexity: exp of the mean cross-entropy per target."""

    def compute(self) -> torch.Tensor:
        """Return the perplexity."""
        return super().compute().exp()


class BitsPer(NatsPer):
    """Cross-entropy in bits per unit of text."""

    def compute(self) -> torch.Tensor:
        """Return the bits per unit (float64)."""
        return super().compute() / math.log(2)


class CorpusScore(Metric):
    """A corpus-level metric of sacrebleu, given by its class name in `sacrebleu.metrics`.

    The texts are kept, concatenated into one tensor per batch: ranks gather only tensors, and the score is sacrebleu's
    own on the whole corpus, independent of the order.
    """

    higher_is_better = True
    full_state_update = False
    texts: list[torch.Tensor]

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self._scorer = getattr(_module("sacrebleu.metrics", "sacrebleu"), name)(**options)
        self._scorer.corpus_score([""], [[""]])  # sets the number of references, for the signature
        self.add_state("texts", [], dist_reduce_fx="cat")

    def update(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add texts, each with one reference."""
        pairs = zip(hypotheses, references, strict=True)
        content = b"".join(text.encode(errors="replace") + _END for pair in pairs for text in pair)
        self.texts.append(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device))

    def compute(self) -> torch.Tensor:
        """Return the score: a float64 scalar."""
        content = bytes(dim_zero_cat(self.texts).cpu().numpy())
        texts = [text.decode() for text in content.split(_END)[:-1]]
        score = self._scorer.corpus_score(texts[::2], [texts[1::2]]).score
        return torch.tensor(score, dtype=torch.float64)

    @property
    def signature(self) -> str:
        """Return sacrebleu's signature, to report with the score."""
        return str(self._scorer.get_signature())


class RougeScore(Metric):
    """Mean ROUGE F-measure over all texts, of rouge-score's type `name` (rouge1, rouge2, rougeL), with stemming.

    Each rank scores its own texts; the sum for the mean is exact, so it does not depend on the order.
    """

    higher_is_better = True
    full_state_update = False
    scores: list[torch.Tensor]

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._scorer = _module("rouge_score.rouge_scorer", "rouge-score").RougeScorer([name], use_stemmer=True)
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add texts, each with one reference."""
        pairs = zip(hypotheses, references, strict=True)
        scores = [self._scorer.score(reference, text)[self._name].fmeasure for text, reference in pairs]
        self.scores.append(torch.tensor(scores, dtype=torch.float64, device=self.device))

    def compute(self) -> torch.Tensor:
        """Return the mean: a float64 scalar."""
        scores = dim_zero_cat(self.scores).tolist()
        return torch.tensor(100 * math.fsum(scores) / len(scores), dtype=torch.float64)

    @property
    def signature(self) -> str:
        """Return a description of the metric, to report with the score."""
        return f"{self._name}|measure:f1|stem:yes|version:rouge-score {version('rouge-score')}"


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f'metrics of generated texts need {package}, which is not installed: pip install "shardlaunch[text]"'
        ) from error

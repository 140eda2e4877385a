"""Metrics of generated texts: the libraries' own scores of the whole corpus, on any number of ranks."""

import math
import random
import sys

import pytest
import sacrebleu
import torch.distributed as dist
from rouge_score.rouge_scorer import RougeScorer

from shardlaunch import UserError
from shardlaunch.launcher.training.evaluation import _empty
from shardlaunch.metrics import TEXT_METRICS, text_metrics
from tests.distributed.ranks import run_on_ranks

WORDS = ["the", "a", "cat", "dog", "sees", "runs", "quickly,", "naïve", "Häuser", "10.5", "猫", "!"]
NUM_TEXTS, AT_ONCE = 23, 4
ROUGE = ("rouge1", "rouge2", "rougeL")


def _corpus() -> tuple[list[str], list[str]]:
    """Return hypotheses and references, a few of them empty or equal."""
    rng = random.Random(0)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(5, 12))) for _ in range(NUM_TEXTS)]
    hypotheses = [" ".join(rng.choice([word, word, rng.choice(WORDS)]) for word in text.split()) for text in references]
    return ["", references[1], *hypotheses[2:]], references


def _scores(num_with_texts: int) -> dict[str, float]:
    """Return the scores of texts that are divided among some of the ranks, in small batches. All ranks."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = text_metrics(*TEXT_METRICS)
    hypotheses, references = _corpus()
    for first in range(AT_ONCE * rank, NUM_TEXTS, AT_ONCE * num_with_texts) if rank < num_with_texts else [0]:
        for metric in metrics.values():
            metric.update(hypotheses[first : first + AT_ONCE], references[first : first + AT_ONCE])
    if rank >= num_with_texts:
        _empty(metrics)
    return {name: metric.compute().item() for name, metric in metrics.items()}


@pytest.mark.parametrize(("num_ranks", "num_with_texts"), [(1, 1), (2, 2), (3, 3), (3, 1)])
def test_scores_are_of_the_whole_corpus(num_ranks: int, num_with_texts: int) -> None:
    hypotheses, references = _corpus()
    expected = {
        "bleu": sacrebleu.corpus_bleu(hypotheses, [references]).score,
        "chrf": sacrebleu.corpus_chrf(hypotheses, [references]).score,
    }
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    rouge = [scorer.score(reference, text) for text, reference in zip(hypotheses, references, strict=True)]
    for name in ROUGE:
        expected[name] = 100 * math.fsum(scores[name].fmeasure for scores in rouge) / NUM_TEXTS
    for found in run_on_ranks(num_ranks, _scores, num_with_texts):
        assert found == expected  # to the last digit


def test_signatures_say_what_was_measured() -> None:
    signatures = {name: metric.signature for name, metric in text_metrics(*TEXT_METRICS).items()}
    assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in signatures["bleu"]
    assert "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|" in signatures["chrf"]
    assert "stem:yes" in signatures["rouge2"]


def test_unknown_metric() -> None:
    with pytest.raises(UserError, match=r"unknown metric 'meteor'.*bleu, chrf, rouge1"):
        text_metrics("bleu", "meteor")


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"rouge-score, which is not installed.*shardlaunch\[text\]"):
        text_metrics("rouge1")

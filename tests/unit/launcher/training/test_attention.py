"""Attention with dropout on the CPU: the same numbers as by its formula, and masks drawn as they should be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardlaunch.launcher.options import Options
from shardlaunch.launcher.training import attention
from shardlaunch.launcher.training.attention import attend, faster_attention

SHAPE = (2, 3, 40, 8)
KEYS = 30
DROPOUT = 0.3
CPU = torch.device("cpu")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (SHAPE, (*SHAPE[:2], KEYS, SHAPE[3]), (*SHAPE[:2], KEYS, SHAPE[3]))
    query, key, value = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return query, key, value


def bias_of(kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "keys":  # the last keys of the second sample are padding
        bias = torch.zeros(2, 1, 1, KEYS)
        bias[1, ..., -7:] = -torch.inf
        return bias
    return torch.randn(1, 3, 40, KEYS, generator=torch.Generator().manual_seed(2))


def kept_of(output_of: Callable[[torch.Tensor], torch.Tensor], query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return which probabilities dropout keeps: with the unit matrix as values they are the output."""
    return output_of(torch.eye(KEYS).expand(*SHAPE[:2], KEYS, KEYS)) > 0


def by_formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor
) -> torch.Tensor:
    scores = 0.5 * query @ key.transpose(2, 3)
    return (scores if bias is None else scores + bias).softmax(-1) * kept / (1 - DROPOUT) @ value


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    torch.manual_seed(3)
    return attend(query, key, value, bias, dropout=DROPOUT, scale=0.5)


@pytest.mark.parametrize("heads", [1, 2], ids=lambda heads: f"{heads} at a time")
@pytest.mark.parametrize("kind", ["none", "keys", "heads"])
def test_values_and_gradients_are_those_of_the_formula(kind: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CHUNK", heads * SHAPE[2] * KEYS)
    query, key, value = inputs()
    bias = bias_of(kind)
    kept = kept_of(lambda unit: ours(query, key, unit, bias), query, key)
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    output, expected = ours(query, key, value, bias), by_formula(query, key, value, bias, kept)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)  # 0.7 is not a multiple of 2^-16
    for mine, theirs in zip(
        torch.autograd.grad(output, (query, key, value), gradient),
        torch.autograd.grad(expected, (query, key, value), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_are_those_of_the_formula() -> None:
    query, key, value = inputs()
    kept = kept_of(lambda unit: ours(query, key, unit), query, key)
    penalties = []
    for output in (ours(query, key, value), by_formula(query, key, value, None, kept)):
        (by_query,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        penalties.append(torch.autograd.grad(by_query.square().sum(), (query, key, value)))
    for mine, theirs in zip(*penalties, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0001, 0.1, 0.5, 0.9999])
def test_as_many_are_dropped_as_should_be_and_each_on_its_own(dropout: float) -> None:
    torch.manual_seed(0)
    query = torch.zeros(1, 4, 400, 1)
    kept = attend(query, query, torch.eye(400).expand(1, 4, 400, 400), None, dropout=dropout, scale=1.0)[0] > 0
    deviation = (dropout * (1 - dropout)) ** 0.5

    def assert_near(values: torch.Tensor, count: int) -> None:
        """Means of `count` draws are within 6 standard deviations."""
        assert ((values - (1 - dropout)).abs() <= 6 * deviation / count**0.5 + 1e-5).all()

    share = kept.double()
    assert_near(share.mean(), share.numel())
    if 0.01 < dropout < 0.99:  # enough of both for means of few
        assert_near(share.mean((1, 2)), 400 * 400)
        assert_near(share.mean(-1), 400)
        assert_near(share.mean(1), 400)
        for shift in (1, 2, 3, 4):  # neighbours come from the same random number
            both = (share[..., :-shift] * share[..., shift:]).mean()
            assert abs(both - (1 - dropout) ** 2) < 6 * 2 / share.numel() ** 0.5


def small_model(kind: str) -> nn.Module:
    """Return a model with dropout in its attention only."""
    if kind == "BERT":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return BertModel(BertConfig(vocab_size=11, hidden_dropout_prob=0.0, **sizes))
    return GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, embd_pdrop=0.0, resid_pdrop=0.0))


def hidden(model: nn.Module, tokens: int, **others: Any) -> torch.Tensor:
    torch.manual_seed(0)
    ids = torch.arange(2 * tokens).view(2, tokens) % 11
    states: torch.Tensor = model(input_ids=ids, **others).last_hidden_state
    return states


@pytest.mark.parametrize("kind", ["BERT", "GPT-2"])
def test_models_use_it_where_it_pays_and_nowhere_else(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, dropout: float, **others: Any) -> torch.Tensor:
        calls.append(dropout)
        return attend(*args, dropout=dropout, **others)

    monkeypatch.setattr(attention, "attend", counted)
    # Nothing is dropped, and what is kept is scaled as if 0.1 were.
    monkeypatch.setattr(attention, "_draw", lambda kept, keep: kept.fill_(1).float().mul_(0.9))
    model = small_model(kind)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    long = attention.LEAST_TOKENS
    padding = torch.ones(2, long, dtype=torch.long)
    padding[1, -20:] = 0
    for mask in (None, padding):
        with faster_attention(Options(), CPU):
            mine = hidden(model.train(), long, attention_mask=mask)
        assert calls.pop() == pytest.approx(0.1)
        theirs = hidden(model.eval(), long, attention_mask=mask)
        seen = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(mine[seen], theirs[seen], rtol=1e-3, atol=1e-4)
    model.train()
    with faster_attention(Options(), CPU):
        hidden(model, long - 1)
        hidden(model.eval(), long)
    for options in (Options(attention="plain"), Options(compile=True)):
        with faster_attention(options, CPU):
            hidden(model.train(), long)
    hidden(model, long)
    assert not calls
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before

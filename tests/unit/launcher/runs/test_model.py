"""Weights at the start of a run."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from shardlaunch import Options, Recipe, UserError
from shardlaunch.launcher.runs.model import Origins, build_empty_model, build_model
from shardlaunch.recipes.bert_imdb import BertImdb, BertOptions
from tests.recipes import save_small_bert


class _Plain(Recipe):
    def model(self) -> nn.Module:
        last = nn.Linear(3, 2)
        nn.init.zeros_(last.weight)
        return nn.Sequential(nn.Linear(3, 3), last)


class _Pretrained(_Plain):
    def weights(self) -> Mapping[str, torch.Tensor]:
        return {"0.weight": torch.ones(3, 3)}


class _Misfit(_Plain):
    def weights(self) -> Mapping[str, torch.Tensor]:
        return {"0.weight": torch.ones(3, 4), "nowhere": torch.ones(1)}


def _build(recipe: Recipe, seed: int) -> tuple[dict[str, torch.Tensor], Origins]:
    torch.rand(1)  # what was drawn before must not matter
    model, fresh = build_model(recipe, seed, is_resumed=False)
    return model.state_dict(), fresh


def test_fresh_weights_are_a_function_of_the_seed_and_keep_the_constructors_will() -> None:
    state, fresh = _build(_Plain(Options()), 1)
    again, _ = _build(_Plain(Options()), 1)
    other, _ = _build(_Plain(Options()), 2)
    assert fresh.new == list(state)
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["0.weight"], other["0.weight"])
    assert not state["1.weight"].any()


def test_pretrained_weights_by_name() -> None:
    state, fresh = _build(_Pretrained(Options()), 1)
    assert fresh.pretrained == ["0.weight"]
    assert state["0.weight"].eq(1).all()
    with pytest.raises(UserError, match=r"nowhere"):
        _build(_Misfit(Options()), 1)


class _Tied(Recipe):
    """A model with tied weights, both kinds of buffers, and weights set in its constructor."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        model[1].weight = model[0].weight
        shared = nn.Parameter(torch.rand(3))
        model[0].extra = model[1].extra = shared
        model.register_buffer("steps", torch.arange(4), persistent=False)
        return model.double()


def test_an_empty_model_has_names_ties_and_buffers_but_no_values() -> None:
    whole, _ = build_model(_Tied(Options()), 0, is_resumed=False)
    empty = build_empty_model(_Tied(Options()), 0)
    shapes = {name: (p.shape, p.dtype) for name, p in whole.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty[0].weight is empty[1].weight
    assert empty[0].extra is empty[1].extra
    for name, buffer in whole.named_buffers():
        assert torch.equal(empty.get_buffer(name), buffer), name
    assert not nn.Linear(1, 1).weight.is_meta, "other models are built as ever"


def test_a_new_head_on_a_pretrained_encoder(tmp_path: Path) -> None:
    save_small_bert(tmp_path)
    recipe = BertImdb(BertOptions(model=str(tmp_path)))
    # As datasets() leaves it.
    recipe.source, recipe.class_names = str(tmp_path), ["bad", "good", "mixed"]
    recipe.config = AutoConfig.from_pretrained(tmp_path)
    state, fresh = _build(recipe, 1)
    assert fresh.drawn == ["classifier.weight", "classifier.bias"]
    other, _ = _build(recipe, 2)
    again, _ = _build(recipe, 1)
    differing = [name for name in state if not torch.equal(state[name], other[name])]
    assert differing == ["classifier.weight"]
    assert torch.equal(state["classifier.weight"], again["classifier.weight"])
    assert state["classifier.weight"].std().item() == pytest.approx(0.02, rel=0.3)

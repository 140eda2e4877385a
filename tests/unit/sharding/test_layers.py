"""Which modules are gathered as a unit."""

import pytest
import torch
from torch import nn

from shardlaunch import UserError
from shardlaunch.sharding.layers import fp32_modules, large_ends, layers_to_wrap


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.table = nn.Embedding(5, 3)
        self.inner: nn.Module | None = None


def _model() -> nn.Sequential:
    model = nn.Sequential(Block(), Block(), nn.Linear(3, 3))
    model[1].inner = Block()
    return model


def test_outer_modules_of_the_classes_asked_for() -> None:
    model = _model()
    assert layers_to_wrap(model, ["Block"]) == [model[0], model[1]]
    assert layers_to_wrap(model, ["Linear", "Block"]) == [model[0], model[1], model[2]]
    assert layers_to_wrap(model, []) == []


def test_what_the_model_declares() -> None:
    model = _model()
    model._no_split_modules = ["Block"]  # as Hugging Face models do
    assert layers_to_wrap(model, ()) == [model[0], model[1]]
    assert layers_to_wrap(model, ("Linear",)) == [model[0].first, model[1].first, model[1].inner.first, model[2]]


def test_a_module_with_a_tied_parameter_stays_with_the_rest() -> None:
    model = _model()
    model[2].weight = model[0].first.weight
    assert layers_to_wrap(model, ["Block"]) == [model[1]]


def test_a_class_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"--layer-classes Blok: .*Block, Embedding, LayerNorm, Linear, Sequential"):
        layers_to_wrap(_model(), ["Blok"])


def test_what_autocast_does_not_cast_is_gathered_as_it_is() -> None:
    block = Block()
    assert fp32_modules(block) == [block.table, block.norm]
    block.inner = nn.Sequential(nn.LayerNorm((2, 2)), nn.EmbeddingBag(3, 2), nn.Conv1d(1, 1, 1))
    assert fp32_modules(block) == [block.inner[1], block.inner[0], block.table, block.norm]
    block.scale = nn.Parameter(torch.ones(3))
    assert fp32_modules(block)[-1] is block, "a layer with such a weight of its own comes after what is in it"
    block.first.weight = block.table.weight
    assert block.table not in fp32_modules(block)


class Language(nn.Module):
    """A language model with the names of Hugging Face's."""

    _no_split_modules = ("Block",)

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(vocabulary, 3), Block(), nn.Linear(3, vocabulary, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def _ends(model: nn.Module) -> list[nn.Module]:
    return large_ends(model, layers_to_wrap(model, ()))


def test_an_embedding_and_a_head_that_are_larger_than_each_layer() -> None:
    model = Language(50)
    assert _ends(model) == [model.table, model.head]
    outer = nn.ModuleDict({"inner": model, "other": nn.Embedding(900, 3)})
    assert _ends(outer) == [model.table, model.head]
    assert _ends(Language(5)) == []
    assert large_ends(model, []) == []


def test_ends_that_stay_with_the_rest() -> None:
    class Scaled(nn.Embedding):
        pass

    model = Language(50)
    model.head.weight = model.table.weight
    assert _ends(model) == []
    model = Language(50)
    model.table = Scaled(50, 3)
    assert _ends(model) == [model.head]
    model.head.bias = nn.Parameter(torch.ones(50))
    assert _ends(model) == []
    model.head.bias = None
    model.block.table = model.head  # no module outside of the layer
    assert _ends(model) == []
    model.get_output_embeddings = lambda: None  # type: ignore[method-assign,assignment,return-value]
    assert _ends(model) == []

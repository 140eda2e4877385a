"""Values at the start of a sharded run: one at a time, and to the bit those of the whole model."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from shardlaunch import Options, Recipe
from shardlaunch.checkpoints.stored import StoredTensors
from shardlaunch.data import stored_weights
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.model import build_model
from shardlaunch.launcher.runs.start_values import StartValues, record_model, start_values
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.initial_weights import InitialWeights
from shardlaunch.sharding.world import World
from shardlaunch.text import from_config, pretrained_weights


def checked_values(model: Any, weights: Any = dict, init: Path | None = None) -> StartValues:
    """Return the values of a model, after a comparison with those of the whole model; they are read in two ranges."""
    recipe = type("_", (Recipe,), {"model": lambda self: model(), "weights": lambda self: weights()})(Options())
    opened = [InitFrom.opened(init, warn=print) if init is not None else None for _ in range(2)]
    whole, origins = build_model(recipe, 3, is_resumed=False, init=opened[0])
    recorded = record_model(recipe, 3)
    assert all(parameter.device.type == "meta" for parameter in recorded.model.parameters())
    state = torch.get_rng_state()
    values = start_values(recipe, 3, recorded, init=opened[1])
    assert values.origins == origins
    reader = InitialWeights(recorded.model, values, world=World())
    expected = dict(whole.named_parameters()) | persistent_buffers(whole)
    assert [spec.name for spec in reader.specs()] == list(expected)
    for spec in reader.specs():
        middle = spec.num_elements // 2
        read = torch.cat([reader.read(spec, 0, middle), reader.read(spec, middle, spec.num_elements)])
        assert read.dtype == expected[spec.name].dtype, spec.name
        assert torch.equal(read, expected[spec.name].detach().reshape(-1)), spec.name
    assert torch.equal(torch.get_rng_state(), state)
    assert values.digest() == start_values(recipe, 3, record_model(recipe, 3), init=opened[1]).digest()
    return values


class _Zoo(nn.Module):
    """What constructors do to parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Linear(8, 8), nn.Embedding(10, 6, padding_idx=2)
        self.cut, self.turned, self.conv = nn.Linear(8, 8), nn.Linear(8, 6), nn.Conv1d(3, 3, 3)
        nn.init.trunc_normal_(self.cut.weight, std=0.02)  # draws until all values fit
        nn.init.orthogonal_(self.turned.weight)  # computes with what it drew
        nn.init.dirac_(self.conv.weight)
        self.linear.weight.data.mul_(0.5)
        self.table = nn.Parameter(torch.randn(5, 5))
        self.copy = deepcopy(self.linear)
        self.twice = nn.Parameter(self.linear.weight.detach() * 2)
        self.other = nn.Linear(8, 8)
        self.other.load_state_dict(self.linear.state_dict())
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.linear.weight
        self.norm, self.attention, self.lstm = nn.BatchNorm1d(4), nn.MultiheadAttention(8, 2), nn.LSTM(4, 4)
        self.register_buffer("drawn", torch.rand(4))


def test_what_a_constructor_does_is_done_later_to_one_parameter_at_a_time(tmp_path: Path) -> None:
    for model in (_Zoo, lambda: _Zoo().double(), lambda: _Zoo().to(torch.bfloat16)):
        values = checked_values(model)
        assert not values.whole_model_because
        assert not values.places
    head = {f"attention.{name}": tensor for name, tensor in nn.MultiheadAttention(8, 2).state_dict().items()}
    save_file({"module.tied.weight": torch.full((8, 8), 0.5, dtype=torch.float16)}, tmp_path / "init.safetensors")
    save_file(head, tmp_path / "head.safetensors")
    values = checked_values(_Zoo, lambda: stored_weights(str(tmp_path / "head.safetensors"), head))
    assert values.places.keys() == head.keys()
    values = checked_values(_Zoo, lambda: head, tmp_path / "init.safetensors")
    assert values.places.keys() == {"linear.weight"}, "the name that the tied tensor is saved under"


def _aliased() -> nn.Module:
    module, weight = nn.Linear(3, 3), nn.Parameter(torch.empty(3, 3))
    module.weight = weight
    nn.init.normal_(weight)
    return module


def _by_numpy() -> nn.Module:
    module, weight = nn.Linear(3, 3), torch.empty(30, 30)
    weight.numpy()[:] = 7  # which torch does not see
    module.weight = nn.Parameter(weight)
    return module


def _set_by_data() -> nn.Module:
    module = nn.Linear(3, 3)
    module.weight.data = torch.arange(9.0, device=module.weight.device).reshape(3, 3)
    return module


def _student_and_teacher() -> nn.Module:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return nn.ModuleDict({"student": student, "teacher": deepcopy(student), "head": nn.Linear(3, 2)})


def _tied_and_orthogonal() -> nn.Module:
    layers = nn.Sequential(nn.Linear(3, 3), orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3))
    layers[2].weight = layers[0].weight
    return layers


def _drawn_weights() -> Mapping[str, torch.Tensor]:
    return {"student.0.weight": torch.rand(3, 3)}


@pytest.mark.parametrize(
    ("model", "weights", "reason"),
    [
        (_aliased, dict, "uses a tensor after it has registered it"),
        (_student_and_teacher, lambda: {"student.0.weight": torch.ones(3, 3)}, "takes teacher.0.weight from"),
        (_student_and_teacher, _drawn_weights, "weights() draws random numbers"),
        (_set_by_data, dict, "cannot be recorded"),
        (_tied_and_orthogonal, dict, "the constructor needs values of parameters (Tensor.item()"),
        (lambda: spectral_norm(nn.Linear(3, 3)), dict, "computes buffers from values of parameters: parametrizations."),
        (_by_numpy, dict, ""),
    ],
)
def test_what_cannot_be_had_so_is_taken_from_the_whole_model_and_said(model: Any, weights: Any, reason: str) -> None:
    values = checked_values(model, weights)
    assert reason in values.whole_model_because
    assert bool(values.whole_model_because) == bool(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pretrained_models_stay_in_their_files(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also under a prefix, with tied weights, and of another dtype; only a new head is drawn."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        GPT2Model(config).to(dtype).save_pretrained(tmp_path)  # names without `transformer.`
    values = checked_values(
        lambda: from_config(AutoModelForCausalLM, config, tmp_path),
        lambda: pretrained_weights(AutoModelForCausalLM, tmp_path),
    )
    assert (len(values.places), list(values.made), list(values.tensors)) == (28, [], [])
    assert {place.entry.dtype for place in values.places.values()} == {dtype}
    values = checked_values(
        lambda: from_config(AutoModelForSequenceClassification, config, tmp_path),
        lambda: pretrained_weights(AutoModelForSequenceClassification, tmp_path),
    )
    assert (len(values.places), list(values.made)) == (28, ["score.weight"])
    values = checked_values(lambda: from_config(AutoModelForCausalLM, config, tmp_path))
    assert (len(values.made), values.whole_model_because) == (28, "")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_beside_pretrained_weights_are_made_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(tmp_path)

    def model() -> nn.Module:
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        adapted: nn.Module = peft.get_peft_model(from_config(AutoModelForCausalLM, config, tmp_path), lora)
        return adapted

    def weights() -> Mapping[str, torch.Tensor]:
        stored = pretrained_weights(AutoModelForCausalLM, tmp_path)
        assert isinstance(stored, StoredTensors)
        return stored.renamed(
            lambda name: f"base_model.model.{name.replace('q_proj.weight', 'q_proj.base_layer.weight')}"
        )

    values = checked_values(model, weights)
    assert {name.rpartition(".lora_")[2] for name in values.made} == {"A.default.weight", "B.default.weight"}
    assert not values.whole_model_because

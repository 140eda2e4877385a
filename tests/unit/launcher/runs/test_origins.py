"""What a constructor sets is kept: only what pretrained weights should have set, and did not, is drawn anew."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Options, Recipe, UserError
from shardlaunch.launcher.runs.model import Origins, build_empty_model, build_model
from shardlaunch.text import from_config, from_source, pretrained_weights

WIDTH = 16
IDS = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny random causal model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return _saved(LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny random encoder with a head of 3 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
    )
    return _saved(BertForSequenceClassification, config, tmp_path_factory.mktemp("bert"))


def _saved(model_class: Any, config: Any, folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model_class(config).save_pretrained(folder)
    return str(folder)


def _built(model: Any, weights: Any = dict) -> tuple[nn.Module, Origins]:
    recipe = type("_", (Recipe,), {"model": lambda self: model(), "weights": lambda self: weights()})(Options())
    torch.rand(1)  # what was drawn before must not matter
    built, origins = build_model(recipe, 0, is_resumed=False)
    again, _ = build_model(recipe, 0, is_resumed=False)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), again.parameters(), strict=True))
    return built.eval(), origins


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def _causal(folder: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return from_config(AutoModelForCausalLM, from_source(AutoConfig, folder), folder)


def _classifier(folder: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    return from_config(AutoModelForSequenceClassification, from_source(AutoConfig, folder, **changes), folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("is_from_pretrained", [False, True])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_peft_start_as_the_base_model(llama: str, use_dora: bool, is_from_pretrained: bool) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def model() -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(llama) if is_from_pretrained else _causal(llama)
        wanted: nn.Module = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=use_dora, task_type="CAUSAL_LM")
        )
        return wanted

    def weights() -> Mapping[str, torch.Tensor]:
        stored = pretrained_weights(AutoModelForCausalLM, llama)
        layered = {f"{name}.weight": f"{name}.base_layer.weight" for name in ("q_proj", "v_proj")}
        for old, new in layered.items():
            stored = {name.replace(old, new): tensor for name, tensor in stored.items()}
        return {f"base_model.model.{name}": tensor for name, tensor in stored.items()}

    base = AutoModelForCausalLM.from_pretrained(llama)
    built, origins = _built(model, dict if is_from_pretrained else weights)
    if use_dora:  # it multiplies and divides by the same norm
        assert torch.allclose(_logits(built), _logits(base), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(_logits(built), _logits(base))
    assert not origins.drawn
    assert {name for name in origins.constructed if "lora_B" in name} == {
        name for name, _ in built.named_parameters() if "lora_B" in name
    }
    assert all("lora_" in name for name in origins.constructed)


class _ZeroAdapter(nn.Module):
    """A layer and a second one beside it, which starts at zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.up.weight.data.zero_()  # as many write it; it leaves no trace in the tensor's version
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y + self.up(self.down(x))


def test_an_adapter_by_hand_starts_as_the_base_model(bert: str) -> None:
    from transformers import AutoModelForSequenceClassification

    def model() -> Any:
        built = _classifier(bert)
        for layer in built.bert.encoder.layer:
            layer.attention.output.dense = _ZeroAdapter(layer.attention.output.dense)
        return built

    def weights() -> Mapping[str, torch.Tensor]:
        stored = pretrained_weights(AutoModelForSequenceClassification, bert)
        return {
            name.replace("output.dense.", "output.dense.inner."): t for name, t in stored.items() if "attention" in name
        } | {name: tensor for name, tensor in stored.items() if "attention" not in name}

    built, origins = _built(model, weights)
    assert torch.equal(_logits(built), _logits(AutoModelForSequenceClassification.from_pretrained(bert)))
    assert {name.split(".")[-2] for name in origins.constructed} == {"down", "up"}
    assert not origins.drawn


def test_a_head_that_the_constructor_sets_is_kept_and_another_is_drawn(bert: str) -> None:
    from transformers import AutoModelForSequenceClassification

    def weights() -> Mapping[str, torch.Tensor]:
        return pretrained_weights(AutoModelForSequenceClassification, bert, num_labels=5)

    def zero_head() -> Any:
        model = _classifier(bert, num_labels=5)
        model.classifier.weight.data.zero_()
        return model

    def other_head() -> Any:
        model = _classifier(bert, num_labels=5)
        model.classifier = nn.Sequential(nn.Linear(WIDTH, 5))
        nn.init.constant_(model.classifier[0].weight, 0.5)
        return model

    built, origins = _built(zero_head, weights)
    assert not _logits(built).any()
    assert (origins.constructed, origins.drawn) == (["classifier.weight"], ["classifier.bias"])
    built, origins = _built(other_head, lambda: {n: t for n, t in weights().items() if "classifier" not in n})
    assert built.get_parameter("classifier.0.weight").eq(0.5).all()
    built, origins = _built(lambda: _classifier(bert, num_labels=5), weights)
    assert origins.drawn == ["classifier.weight", "classifier.bias"]
    assert origins.rows()[-1] == ("classifier", "", "", "2")


def test_a_grown_vocabulary_keeps_its_old_rows(bert: str) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    def model() -> Any:
        grown = Auto.from_pretrained(bert)
        grown.resize_token_embeddings(61)
        return grown

    built, _ = _built(model)
    assert built.get_parameter("bert.embeddings.word_embeddings.weight").shape == (61, WIDTH)
    assert torch.equal(_logits(built), _logits(Auto.from_pretrained(bert)))
    with pytest.raises(UserError, match=r"word_embeddings\.weight \(returned \[60, 16\], here \[61, 16\]\).*has grown"):
        _built(lambda: _classifier(bert, vocab_size=61), lambda: pretrained_weights(Auto, bert))


def test_two_encoders_in_one_model_are_drawn_each_by_its_name(bert: str) -> None:
    from transformers import AutoConfig, AutoModel

    def model() -> nn.Module:
        config = from_source(AutoConfig, bert)
        both = nn.ModuleDict({name: from_config(AutoModel, config, bert) for name in ("left", "right")})
        both["head"] = nn.Linear(WIDTH, 2)
        nn.init.ones_(both["head"].weight)
        return both

    built, origins = _built(model)
    assert origins.constructed == ["head.weight", "head.bias"]
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(built.get_parameter(f"left.{name}"), built.get_parameter(f"right.{name}"))
    assert built.get_parameter("head.weight").eq(1).all()


def test_from_pretrained_in_the_constructor_is_pretrained_on_any_device(bert: str) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    built, origins = _built(lambda: Auto.from_pretrained(bert, num_labels=5, ignore_mismatched_sizes=True))
    assert origins.drawn == ["classifier.weight", "classifier.bias"]
    assert not origins.constructed
    assert built.get_parameter("classifier.weight").std().item() == pytest.approx(0.02, rel=0.3)
    recipe = type("_", (Recipe,), {"model": lambda self: Auto.from_pretrained(bert)})(Options())
    empty = build_empty_model(recipe, 0)
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_names_that_match_none_are_listed_with_the_nearest(bert: str) -> None:
    weights = {"bert.encoder.layers.0.attention.self.query.weight": torch.zeros(1), "zzz": torch.zeros(1)}
    with pytest.raises(UserError) as raised:
        _built(lambda: _classifier(bert), lambda: weights)
    assert "(nearest: bert.encoder.layer.0.attention.self.query.weight), zzz." in str(raised.value)


class _Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import random

        import numpy as np

        self.weight = nn.Parameter(torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]))


def test_a_constructor_may_draw_from_any_generator() -> None:
    built, origins = _built(_Random)
    assert origins.constructed == ["weight"]
    assert len(set(built.get_parameter("weight").tolist())) == 3


def test_low_precision_is_widened_and_all_else_keeps_its_dtype() -> None:
    def model() -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_buffer("low", torch.tensor([1 / 3], dtype=torch.bfloat16))
        module.register_buffer("exact", torch.tensor([1 / 3], dtype=torch.float64))
        return module

    built, _ = _built(model)
    assert (built.get_buffer("low").dtype, built.get_buffer("exact").dtype) == (torch.bfloat16, torch.float64)
    built, _ = _built(lambda: model().to(torch.bfloat16))
    assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.float32}
    built, _ = _built(lambda: model().double())
    assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.LazyLinear(3), "weight, bias; the optimizer needs the sizes"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()), r"learn their sizes.*1\.weight"),
        (lambda: nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), r"0 \(complex64\)"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(3)), r"SyncBatchNorm layers, whose statistics depend on.*: 0\."),
        (lambda: None, "must return a torch module; it returned NoneType"),
    ],
)
def test_models_that_no_run_can_keep_are_refused(model: Any, message: str) -> None:
    for build in (lambda recipe: build_model(recipe, 0, is_resumed=False), lambda recipe: build_empty_model(recipe, 0)):
        with pytest.raises(UserError, match=message):
            build(type("_", (Recipe,), {"model": lambda self: model()})(Options()))


def test_a_copy_of_pretrained_parts_is_a_copy_of_the_pretrained_values(bert: str) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    def model() -> nn.Module:
        student = _classifier(bert)
        return nn.ModuleDict({"student": student, "teacher": deepcopy(student).requires_grad_(False)})

    built, origins = _built(model, lambda: {f"student.{n}": t for n, t in pretrained_weights(Auto, bert).items()})
    base = Auto.from_pretrained(bert).state_dict()
    assert all(torch.equal(built.get_parameter(f"teacher.{name}"), tensor) for name, tensor in base.items())
    assert not origins.stale


def test_a_copy_of_what_weights_replace_afterwards_is_named() -> None:
    def model() -> nn.Module:
        student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))  # norms are alike in all models
        return nn.ModuleDict({"student": student, "teacher": deepcopy(student), "head": nn.Linear(3, 2)})

    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    _, origins = _built(
        model,
        lambda: {f"student.{name}": torch.full_like(model()["student"].get_parameter(name), 7.0) for name in names},
    )
    assert origins.stale == ["teacher.0.weight", "teacher.0.bias"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_head_that_peft_trains_beside_the_adapters_starts_as_the_pretrained_one(bert: str) -> None:
    """peft trains a copy, which it makes before weights() is asked."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification as Auto

    def model() -> nn.Module:
        config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
        wanted: nn.Module = peft.get_peft_model(_classifier(bert), config)
        return wanted

    def weights() -> Mapping[str, torch.Tensor]:
        stored = pretrained_weights(Auto, bert)
        for old, new in (("query", "query.base_layer"), ("classifier", "classifier.original_module")):
            stored = {name.replace(old, new): tensor for name, tensor in stored.items()}
        return {f"base_model.model.{name}": tensor for name, tensor in stored.items()}

    built, origins = _built(model, weights)
    assert torch.equal(_logits(built), _logits(Auto.from_pretrained(bert)))
    assert not origins.stale


def test_loaded_weights_survive_an_initializer_that_writes_into_the_data(bert: str, tmp_path: Path) -> None:
    """As models outside of transformers have it; the flags of loaded parameters do not stop it."""
    from transformers import BertModel, BertPreTrainedModel

    class Own(BertPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = BertModel(config)
            self.gate = nn.Parameter(torch.full((3,), 0.5))
            self.head = nn.Linear(WIDTH, 2)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                module.weight.data.normal_(0, 0.3)
                if module.bias is not None:
                    module.bias.data.fill_(9.0)

    model = Own(from_source(__import__("transformers").AutoConfig, bert))
    nn.init.constant_(model.head.weight, 0.25)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"}
    built, origins = _built(lambda: Own(model.config), lambda: state)
    assert origins.drawn == ["head.bias"]
    assert built.get_parameter("head.weight").eq(0.25).all()
    assert built.get_parameter("head.bias").eq(9).all()
    assert built.get_parameter("gate").eq(0.5).all()

"""Adapters in many families of models: they begin as the base model, and peft loads what is saved of them.

Among all tests, a few families; `make test-families` compares all of them.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardlaunch import Options
from shardlaunch.launcher.runs.lora import add_adapters
from shardlaunch.launcher.runs.model import load_weights, origins_of
from shardlaunch.text import from_config, from_source, pretrained_weights
from tests.families.models import save_model, save_tokenizer
from tests.families.test_start_values import ALL, HEADS, REFUSED

peft = pytest.importorskip("peft")
FEW = (("SequenceClassification", "roberta"), ("CausalLM", "gpt_neox"), ("Seq2SeqLM", "bart"))


CASES = [(head, name) for head, names in HEADS.items() for name in names if name not in REFUSED] if ALL else FEW


@pytest.mark.parametrize(("head", "family"), CASES)
def test_peft_loads_the_adapters_of_a_family(head: str, family: str, tmp_path: Path) -> None:
    import transformers

    auto = getattr(transformers, f"AutoModelFor{head}")
    tokenizer = save_tokenizer(tmp_path, kind="plain")
    save_model(tmp_path / "base", auto, family, tokenizer=tokenizer)
    more = {"num_labels": 5} if head == "SequenceClassification" else {}
    config = from_source(transformers.AutoConfig, tmp_path / "base", **more)
    config.pad_token_id = 0
    model = from_config(auto, config, family).eval()
    weights = pretrained_weights(auto, tmp_path / "base", **more)
    load_weights(model, weights)
    inputs = torch.arange(4, 20).view(2, 8)
    inputs[:, -1] = 2  # the end of the text, which some models look for
    before = _outputs(model, inputs)
    adapters, _ = add_adapters(model, Options(lora_rank=2), new=origins_of(model, weights, ()).new)
    # To the bit, but in families whose kernels go by how a tensor lies in memory, as Jamba's and Longformer's.
    tolerance = 1e-5 if ALL else 0.0
    torch.testing.assert_close(_outputs(model, inputs), before, rtol=0, atol=tolerance)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained <= adapters.saved_names.keys()
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.3 * torch.randn(model.get_parameter(name).shape))
    tensors = {saved: model.state_dict()[name].contiguous() for name, saved in adapters.saved_names.items()}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapters.config))
    base = auto.from_pretrained(tmp_path / "base", config=config, ignore_mismatched_sizes=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [one for one in caught if "missing" in str(one.message) or "unexpected" in str(one.message)]
    expected = _outputs(model, inputs)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(_outputs(loaded, inputs), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(_outputs(loaded.merge_and_unload(), inputs), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    decoder: dict[str, Any] = {"decoder_input_ids": inputs} if _takes_two(model) else {}
    logits: torch.Tensor = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), **decoder).logits
    return logits


def _takes_two(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "Classification" not in type(model).__name__

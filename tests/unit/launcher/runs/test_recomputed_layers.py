"""Which layers recompute their activations."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from shardlaunch import Options, UserError
from shardlaunch.launcher.runs.assembly import enable_gradient_checkpointing


def _bert(num_layers: int) -> BertForSequenceClassification:
    config = BertConfig(hidden_size=8, num_hidden_layers=num_layers, num_attention_heads=2, intermediate_size=16)
    return BertForSequenceClassification(config).train()


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (9, [2, 1, 1, 1, 1])])
def test_one_of_some_layers(every: int, expected: list[int]) -> None:
    model, calls = _bert(5), [0] * 5
    enable_gradient_checkpointing(model, every=every)
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.attention.register_forward_pre_hook(lambda *_, at=number: calls.__setitem__(at, calls[at] + 1))
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    assert calls == expected


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(UserError, match="every 2: BertForSequenceClassification has no layers to choose from"):
        enable_gradient_checkpointing(_bert(1), every=2)
    with pytest.raises(UserError, match="only with --gradient-checkpointing; add it"):
        Options(gradient_checkpointing_every=2)

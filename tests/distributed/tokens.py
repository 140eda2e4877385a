"""A recipe of small language models for runs with divided layers, and what such runs must come to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from shardlaunch import Options, Recipe, TensorData, fit, option
from tests.distributed.ranks import run_on_ranks
from tests.recipes import final_tensors, losses, training_lines

NUM_TOKENS, LENGTH = 48, 12
WIDE = 1200  # tokens: more weights than a layer has
STEPS, SAVED = 6, 3
BOUND = 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": NUM_TOKENS, "max_position_embeddings": LENGTH, "tie_word_embeddings": False}


@dataclass(kw_only=True)
class TokenOptions(Options):
    """Options of the small language model."""

    kind: str = "llama"
    global_batch_size: int = 8
    micro_batch_size: int = 2
    max_steps: int = STEPS
    save_every: int | str = option(SAVED, mark="free")
    eval_every: int = option(SAVED, mark="free")
    lr: float = 1e-3
    max_grad_norm: float = 0.5
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")
    save_on_best: bool = option(False, mark="free")


class Own(nn.Module):
    """A model that is nobody's, with a plan; a rowwise layer with a bias, and a parameter without dimensions."""

    tp_plan = {"blocks.*.0": "colwise", "blocks.*.2": "rowwise", "words": "embedding_rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_TOKENS, 16, padding_idx=30)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, NUM_TOKENS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.words(inputs)
        for block in self.blocks:
            hidden = hidden + self.drop(block(hidden))
        logits: torch.Tensor = self.head(hidden) * self.scale
        return logits


class Tokens(Recipe):
    """Predict the next token of sequences of a rule."""

    options: TokenOptions
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        return {"train": _sequences(70, 1), "eval": _sequences(19, 2)}

    def model(self) -> nn.Module:
        import transformers as hf

        kinds: dict[str, Any] = {
            "own": Own,
            "wide": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"vocab_size": WIDE})),
            "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
            "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "tie_word_embeddings": True})),
            "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
            "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, attention_dropout=0.0, hidden_dropout=0.1)),
            "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8)),
            "dropout": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_dropout=0.1)),
            "gpt2": lambda: hf.GPT2LMHeadModel(
                hf.GPT2Config(vocab_size=NUM_TOKENS + 1, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4)
            ),
        }
        model: nn.Module = kinds[self.options.kind]()
        return model

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        outputs = model(batch["inputs"], use_cache=False) if hasattr(model, "config") else model(batch["inputs"])
        logits: torch.Tensor = getattr(outputs, "logits", outputs)
        return logits.flatten(0, 1)

    def num_targets(self, batch: Any) -> int:
        return int(batch["labels"].numel())

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"].flatten(), reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        return {"accuracy": MulticlassAccuracy(WIDE, average="micro"), "seen": SumMetric()}

    def update_metrics(self, metrics: Mapping[str, Any], outputs: torch.Tensor, batch: Any) -> None:
        metrics["seen"].update(batch["labels"].numel())  # so that what is counted twice shows
        metrics["accuracy"].update(F.pad(outputs, (0, WIDE - outputs.shape[1])), batch["labels"].flatten())


def _sequences(count: int, seed: int) -> TensorData:
    begin = torch.randint(NUM_TOKENS, (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (begin + torch.arange(LENGTH + 1) * (1 + begin % 3)) % NUM_TOKENS
    return TensorData(inputs=tokens[:, :-1], labels=tokens[:, 1:])


def fit_tokens(run_dir: Path, options: dict[str, Any]) -> None:
    """Train. All ranks."""
    fit(Tokens, output_dir=run_dir, **options)


def divided(num_ranks: int, run_dir: Path, **options: Any) -> Path:
    """Train with each layer divided over two ranks, or as the options say, and return the run's folder."""
    run_on_ranks(num_ranks, fit_tokens, run_dir, {"strategy": "fsdp2", "tensor_parallel": 2} | options)
    return run_dir


def assert_same_run(found: Path, expected: Path) -> None:
    """Check losses, what is logged, and the last weights and optimizer entries."""
    assert losses(found) == pytest.approx(losses(expected), abs=BOUND)
    others = {"loss", "eval/loss", "grad_norm"}
    for one, other in zip(training_lines(found), training_lines(expected), strict=True):
        assert {key: value for key, value in one.items() if key not in others} == pytest.approx(
            {key: value for key, value in other.items() if key not in others}
        )
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-4)
    tensors, whole = final_tensors(found), final_tensors(expected)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: each.shape for name, each in whole.items()
    }
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, whole[name], atol=2e-4), name

"""Layers divided over ranks: the losses of one rank, whole tensors in checkpoints, a resume with whole layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from shardlaunch import Options, Recipe, TensorData, UserError, fit, option
from shardlaunch.sharding.tensor_parallel import divide
from tests.distributed.ranks import run_on_ranks
from tests.recipes import final_tensors, losses, run_quietly, training_lines

NUM_TOKENS, LENGTH = 48, 12
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
        return {"accuracy": MulticlassAccuracy(NUM_TOKENS + 1, average="micro"), "seen": SumMetric()}

    def update_metrics(self, metrics: Mapping[str, Any], outputs: torch.Tensor, batch: Any) -> None:
        metrics["seen"].update(batch["labels"].numel())  # so that what is counted twice shows
        metrics["accuracy"].update(F.pad(outputs, (0, NUM_TOKENS + 1 - outputs.shape[1])), batch["labels"].flatten())


def _sequences(count: int, seed: int) -> TensorData:
    begin = torch.randint(NUM_TOKENS, (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (begin + torch.arange(LENGTH + 1) * (1 + begin % 3)) % NUM_TOKENS
    return TensorData(inputs=tokens[:, :-1], labels=tokens[:, 1:])


def _fit(run_dir: Path, options: dict[str, Any]) -> None:
    fit(Tokens, output_dir=run_dir, **options)


def _divided(num_ranks: int, run_dir: Path, **options: Any) -> Path:
    run_on_ranks(num_ranks, _fit, run_dir, {"strategy": "fsdp2", "tensor_parallel": 2, **options})
    return run_dir


@cache
def _on_one_rank(folder: Path, kind: str) -> Path:
    fit(Tokens, output_dir=folder / kind, kind=kind, keep=0, stop_at_step=SAVED)
    fit(Tokens, output_dir=folder / kind, kind=kind, keep=0)
    return folder / kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def _assert_same_run(found: Path, expected: Path) -> None:
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


@pytest.mark.parametrize(
    ("kind", "num_ranks"), [("llama", 4), ("own", 4), ("gpt2", 2), ("tied", 2), ("qwen3", 2), ("neox", 2), ("gemma", 2)]
)
def test_divided_layers_give_the_losses_of_one_rank(kind: str, num_ranks: int, folder: Path, tmp_path: Path) -> None:
    _assert_same_run(_divided(num_ranks, tmp_path / "run", kind=kind), _on_one_rank(folder, kind))


def test_a_run_goes_on_with_layers_whole_or_divided(folder: Path, tmp_path: Path) -> None:
    whole = _on_one_rank(folder, "llama")
    run_dir = _divided(2, tmp_path / "run", kind="llama", stop_at_step=SAVED, keep=0)
    for name in ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"):
        one, other = (path / "checkpoints" / f"step-{SAVED:08}" / name for path in (run_dir, whole))
        assert one.stat().st_size == other.stat().st_size
    fit(Tokens, output_dir=run_dir, kind="llama", keep=0, strategy="single", stop_at_step=SAVED + 1)
    _divided(4, run_dir, kind="llama", keep=0, stop_at_step=SAVED + 2)
    run_on_ranks(3, _fit, run_dir, {"kind": "llama", "keep": 0, "strategy": "fsdp2"})
    _assert_same_run(run_dir, whole)


def test_a_resume_is_exact(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "kind": "gpt2",
        "replicate_every": 1,
        "precision": "bf16",
        "gradient_checkpointing": True,
    }
    whole = _divided(2, tmp_path / "whole", **options)
    run_dir = _divided(2, tmp_path / "run", stop_at_step=SAVED, **options)
    _divided(2, run_dir, **options)
    assert training_lines(run_dir) == training_lines(whole)
    expected = final_tensors(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_tensors(run_dir).items())


def test_given_weights_are_divided(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "tied", "init_from": str(_on_one_rank(folder, "tied")), "stop_at_step": 1}
    fit(Tokens, output_dir=tmp_path / "whole", **options)
    assert losses(_divided(2, tmp_path / "run", **options)) == pytest.approx(losses(tmp_path / "whole"), abs=BOUND)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kind", "dropout"), "self_attn has attention_dropout=0.1"),
        (("--tensor-parallel", "3"), "2 ranks are not a multiple of it"),
        (("--strategy", "ddp"), "ddp keeps layers whole; use --strategy fsdp2"),
    ],
)
def test_what_cannot_be_divided_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    argv = ["--strategy", "fsdp2", "--tensor-parallel", "2", "--output-dir", str(tmp_path / "run"), *words]
    answers = run_on_ranks(2, run_quietly, Tokens, argv)
    assert [status for status, _ in answers] == [2, 2], answers
    output = "".join(text for _, text in answers)
    assert message in output
    assert output.count("error: ") == 1
    assert not (tmp_path / "run").exists()


class Odd(nn.Module):
    """Layers that cannot be divided, or need not be, by name."""

    def __init__(self, name: str, style: str) -> None:
        super().__init__()
        self.tp_plan = {name: style}
        self.linear = nn.Linear(4, 7)
        self.norm = nn.LayerNorm(4)
        self.words = nn.Embedding(9, 4)
        self.heads = nn.Linear(4, 8)
        self.head_dim = 8


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear does not say what to divide"),
        (Odd("linear", "colwise"), "linear has 7 features, which 2 ranks cannot share evenly"),
        (Odd("norm", "colwise"), "norm is a LayerNorm, which cannot be divided as colwise"),
        (Odd("heads", "colwise"), "heads has 1 heads, which 2 ranks cannot share evenly"),
        (Odd("linear", "moe_tp_experts"), "the plan of Odd has moe_tp_experts, which is not supported"),
    ],
)
def test_layers_that_ranks_cannot_share_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        divide(model, index=0, count=2, group=dist.GroupMember.NON_GROUP_MEMBER)


def test_a_vocabulary_that_ranks_cannot_share_stays_whole() -> None:
    model = Odd("words", "embedding_rowwise")
    parts = divide(model, index=0, count=2, group=dist.GroupMember.NON_GROUP_MEMBER)
    assert parts["words.weight"].dim is None
    assert model.words.weight.shape == (9, 4)
    assert divide(model, index=0, count=3, group=dist.GroupMember.NON_GROUP_MEMBER)["words.weight"].dim == 0
    assert model.words.weight.shape == (3, 4)

"""Layers divided over ranks: the losses of one rank, whole tensors in checkpoints, a resume with whole layers."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardlaunch import UserError, fit
from shardlaunch.sharding.tensor_parallel import divide
from tests.distributed.changes import PLACES, all_changes, problems
from tests.distributed.ranks import run_on_ranks
from tests.distributed.tokens import BOUND, SAVED, Tokens, assert_same_run, divided
from tests.recipes import final_tensors, losses, run_quietly, training_lines


@cache
def _on_one_rank(folder: Path, kind: str) -> Path:
    fit(Tokens, output_dir=folder / kind, kind=kind, keep=0, stop_at_step=SAVED)
    fit(Tokens, output_dir=folder / kind, kind=kind, keep=0)
    return folder / kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize(
    ("kind", "num_ranks", "num_parts"),
    [
        ("llama", 4, 2),
        ("own", 4, 4),
        ("wide", 4, 4),
        ("gpt2", 4, 4),
        ("tied", 2, 2),
        ("qwen3", 2, 2),
        ("neox", 2, 2),
        ("gemma", 2, 2),
    ],
)
def test_divided_layers_give_the_losses_of_one_rank(
    kind: str, num_ranks: int, num_parts: int, folder: Path, tmp_path: Path
) -> None:
    run_dir = divided(num_ranks, tmp_path / "run", kind=kind, tensor_parallel=num_parts)
    assert_same_run(run_dir, _on_one_rank(folder, kind))


def test_a_run_goes_on_with_layers_whole_or_divided(tmp_path: Path) -> None:
    """The short form of tests.faults.topologies, which goes each way between all places."""
    chain = ["divided-1x4", "single", "divided-2x2", "hsdp-2x2", "divided-1x2", "fsdp2-x3"]
    for change, problem, _ in problems(chain, tmp_path, kind="wide"):
        assert not problem, change


def test_all_changes_are_each_once() -> None:
    chain = all_changes(1)
    changes = list(pairwise(chain))
    assert len(changes) == len(set(changes)) == len(PLACES) * (len(PLACES) - 1)
    assert all(one != other for one, other in changes)


def test_a_resume_is_exact(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "kind": "gpt2",
        "replicate_every": 1,
        "ema": 0.5,
        "precision": "bf16",
        "gradient_checkpointing": True,
    }
    whole = divided(2, tmp_path / "whole", **options)
    run_dir = divided(2, tmp_path / "run", stop_at_step=SAVED, **options)
    divided(2, run_dir, **options)
    assert training_lines(run_dir) == training_lines(whole)
    expected = final_tensors(whole)
    assert any(name.startswith("ema/") for name in expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_tensors(run_dir).items())


def test_given_weights_are_divided(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "tied", "init_from": str(_on_one_rank(folder, "tied")), "stop_at_step": 1}
    fit(Tokens, output_dir=tmp_path / "whole", **options)
    assert losses(divided(2, tmp_path / "run", **options)) == pytest.approx(losses(tmp_path / "whole"), abs=BOUND)


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

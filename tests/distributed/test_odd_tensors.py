"""Models with parameters and buffers of odd shapes and dtypes: kept to the bit under every strategy, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Recipe
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NUM_CLASSES, NUM_FEATURES, LinearNet, final_tensors, losses, run_quietly, run_well

ARGV = ["--max-steps", "4", "--lr", "0.05", "--threads-per-rank", "1", "--save-every", "2"]
ARGV += ["--global-batch-size", "12", "--micro-batch-size", "2"]  # sums of six tenths round in float64
KEPT = {
    "large": torch.tensor([2**53 + 1, -(2**62) - 3, 7]),
    "flags": torch.tensor([True, False]),
    "bytes_": torch.arange(4, dtype=torch.uint8),
    "tenth": torch.tensor([0.1, torch.inf], dtype=torch.float64),
    "low": torch.tensor([1 / 3], dtype=torch.bfloat16),
}


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, 8)
        self.last = nn.Linear(8, NUM_CLASSES)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.first.tied = self.scale
        self.shift = nn.Parameter(torch.tensor(0.5))
        self.unreached = nn.Parameter(torch.tensor(3.0))
        self.frozen = nn.Parameter(torch.tensor(0.25), requires_grad=False)
        for name, value in KEPT.items():
            self.register_buffer(name, value.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("turn", torch.polar(torch.ones(8), torch.arange(8.0)), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs)) * self.first.tied + self.shift
        hidden = (hidden * self.turn).abs() * self.frozen
        if self.training:
            self.steps += 1
            self.mean.lerp_(hidden.detach().mean(0).double(), 0.1)
        result: torch.Tensor = self.last(hidden)
        return result


class OddNet(LinearNet):
    """The classifier with such a net."""

    def model(self) -> nn.Module:
        return _Odd()


def _run(argvs: list[list[str]]) -> None:
    for argv in argvs:
        run_well(OddNet, argv)


def test_odd_tensors_are_the_same_under_every_strategy(tmp_path: Path) -> None:
    """fsdp2 also stops and goes on, with the optimizer that is fused by default; ddp goes on from its checkpoint."""

    def argv(name: str, *words: str) -> list[str]:
        return [*ARGV, "--optimizer", "adamw", "--output-dir", str(tmp_path / name), *words]

    run_on_ranks(1, _run, [argv("single"), argv("alone", "--strategy", "fsdp2")])
    halves = argv("halves", "--strategy", "fsdp2")
    names = ("ddp", "fsdp2", "zero3")
    several = [argv(name, "--strategy", name) for name in names]
    run_on_ranks(2, _run, [*several, [*halves, "--stop-at-step", "2"], [*halves[:-1], "ddp"]])
    expected, tensors = losses(tmp_path / "single"), final_tensors(tmp_path / "single")
    assert torch.equal(tensors["steps"], torch.tensor(4))
    for name in ("alone", "halves", *names):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-6), name
        found = final_tensors(tmp_path / name)
        assert found.keys() == tensors.keys()
        for key, value in KEPT.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), (name, key)
        assert found["mean"].dtype == torch.float64
        for key, tensor in tensors.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0)  # AdamW magnifies rounding


class DoubleNet(LinearNet):
    """A net in float64, as its data are."""

    def datasets(self) -> Any:
        splits = super().datasets()
        for split in splits.values():
            split.columns["inputs"] = split.columns["inputs"].double()
        return splits

    def model(self) -> nn.Module:
        return nn.Linear(NUM_FEATURES, NUM_CLASSES).double()

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")


class SparseNet(LinearNet):
    """An embedding with sparse gradients."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), _Bag())


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(100, NUM_CLASSES, sparse=True, mode="sum")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.table((inputs * 50).long().clamp(0, 99))
        return result


class MixedNet(LinearNet):
    """A net of two dtypes."""

    def model(self) -> nn.Module:
        model = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        return model


def _outcomes(runs: list[tuple[type[Recipe], list[str]]]) -> list[tuple[int, str]]:
    return [run_quietly(recipe_type, argv) for recipe_type, argv in runs]


def test_dtypes_and_sparse_gradients_work_or_are_refused(tmp_path: Path) -> None:
    def run(recipe_type: type[Recipe], strategy: str) -> tuple[type[Recipe], list[str]]:
        folder = str(tmp_path / f"{recipe_type.__name__}-{strategy}")
        return recipe_type, [*ARGV, "--output-dir", folder, "--strategy", strategy]

    well = [(kind, name) for kind in (DoubleNet, SparseNet, MixedNet) for name in ("ddp", "fsdp2", "zero2")]
    refused = {
        (SparseNet, "fsdp2"): "FSDP2 cannot reduce the sparse gradients of 1.table",
        (SparseNet, "zero2"): "ZeRO cannot reduce the sparse gradients",
        (DoubleNet, "zero2"): "ZeRO by DeepSpeed trains in float32, but these have another dtype: weight, bias",
        (MixedNet, "zero2"): "another dtype: unused",
        (MixedNet, "fsdp2"): "of one dtype: bias (float32), unused (float64)",
    }
    answers = run_on_ranks(2, _outcomes, [run(*pair) for pair in well])
    for number, pair in enumerate(well):
        status, output = answers[0][number][0], answers[0][number][1] + answers[1][number][1]
        assert status == (2 if pair in refused else 0), output
        assert refused.get(pair, "") in output
    said = " ".join(answers[0][well.index((SparseNet, "ddp"))][1].split())
    assert "warning: the sparse gradients of 1.table are added up as dense ones, and each step updates all" in said
    assert losses(tmp_path / "DoubleNet-fsdp2") == pytest.approx(losses(tmp_path / "DoubleNet-ddp"), abs=1e-12)
    assert final_tensors(tmp_path / "DoubleNet-fsdp2")["weight"].dtype == torch.float64

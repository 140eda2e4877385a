"""A run that stops and resumes is identical to an uninterrupted one."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Recipe
from tests.distributed.ranks import run_on_ranks
from tests.recipes import FewReviews, NetRecipe, final_tensors, run_well, save_small_bert, training_lines

# 203 samples make 7 steps an epoch, the last of 11 samples: 3 micro-batches of 4, 4 and 3.
NUM_STEPS = 24
NET = [
    *("--max-steps", str(NUM_STEPS), "--lr", "0.003", "--eval-every", "5", "--save-every", "9", "--keep", "0"),
    *("--threads-per-rank", "1"),
]
REVIEWS = [
    *("--preset", "demo", "--max-steps", "12", "--global-batch-size", "16", "--micro-batch-size", "2"),
    *("--max-length", "32", "--tracker", "none", "--threads-per-rank", "1"),
]


def _run_in_parts(recipe_type: type[Recipe], argv: list[str], output_dir: Path, parts: list[tuple[int, int]]) -> None:
    """Run to each (ranks, step to stop at; 0: the end) in turn, each time with new processes."""
    for num_ranks, step in parts:
        stop = ["--stop-at-step", str(step)] if step else []
        run_on_ranks(num_ranks, run_well, recipe_type, [*argv, *stop, "--output-dir", str(output_dir)])


def _assert_bit_identical(one: Path, other: Path) -> None:
    assert training_lines(one) == training_lines(other)
    tensors, others = final_tensors(one), final_tensors(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)


@pytest.fixture(scope="module", params=[1, 2, 4])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    _run_in_parts(NetRecipe, NET, output_dir, [(request.param, 0)])
    return request.param, output_dir


@pytest.mark.parametrize("stops", [[3], [7], [6, 8], [10, 10, 11], [23]], ids=str)
def test_resume_is_bit_identical(stops: list[int], uninterrupted: tuple[int, Path], tmp_path: Path) -> None:
    num_ranks, expected = uninterrupted
    _run_in_parts(NetRecipe, NET, tmp_path, [*((num_ranks, step) for step in stops), (num_ranks, 0)])
    _assert_bit_identical(expected, tmp_path)


@pytest.mark.parametrize("options", [["--optimizer", "sgd", "--momentum", "0.9"], ["--precision", "bf16"]], ids=str)
def test_resume_of_other_optimizer_and_precision(options: list[str], tmp_path: Path) -> None:
    for name, parts in {"whole": [(2, 0)], "parts": [(2, 5), (2, 0)]}.items():
        _run_in_parts(NetRecipe, [*NET, *options], tmp_path / name, parts)
    _assert_bit_identical(tmp_path / "whole", tmp_path / "parts")


class Waning(torch.optim.AdamW):
    """An optimizer that keeps state in its parameter groups, as some do: each step moves less than the one before."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
            group["lr"] /= group["taken"]
        super().step(closure)


class WaningNet(NetRecipe):
    """The net, trained by it."""

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return Waning([parameter for _, parameter in parameters], lr=self.options.lr)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resume_of_state_in_parameter_groups(strategy: str, tmp_path: Path) -> None:
    argv = [*NET, "--strategy", strategy]
    for name, parts in {"whole": [(2, 0)], "parts": [(2, 5), (2, 0)]}.items():
        _run_in_parts(WaningNet, argv, tmp_path / name, parts)
    _assert_bit_identical(tmp_path / "whole", tmp_path / "parts")


def test_bert_resumes_bit_identically(tmp_path: Path) -> None:
    save_small_bert(tmp_path / "model")
    argv = [*REVIEWS, "--model", str(tmp_path / "model")]
    for name, parts in {"whole": [(4, 0)], "parts": [(4, 5), (4, 0)]}.items():
        _run_in_parts(FewReviews, argv, tmp_path / name, parts)
    _assert_bit_identical(tmp_path / "whole", tmp_path / "parts")


def test_resume_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    _run_in_parts(NetRecipe, NET, tmp_path / "one", [(1, 0)])
    _run_in_parts(NetRecipe, NET, tmp_path / "many", [(1, 4), (4, 9), (2, 17), (3, 0)])
    pairs = zip(training_lines(tmp_path / "one"), training_lines(tmp_path / "many"), strict=True)
    for expected, found in pairs:
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-5)
    tensors, others = final_tensors(tmp_path / "one"), final_tensors(tmp_path / "many")
    assert tensors.keys() == others.keys()
    for key in tensors:
        torch.testing.assert_close(others[key], tensors[key], atol=5e-5, rtol=0, msg=key)


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    """A run that dies after its last checkpoint has logged steps that the resumed run repeats."""
    _run_in_parts(NetRecipe, NET, tmp_path, [(1, 9)])
    log = tmp_path / "metrics.jsonl"
    with open(log, "a") as file:
        file.write(json.dumps({"step": 10, "loss": 1.0}) + "\n" + '{"step": 11, "lo')
    _run_in_parts(NetRecipe, NET, tmp_path, [(1, 0)])
    steps = [line["step"] for line in training_lines(tmp_path) if "loss" in line]
    assert steps == list(range(1, NUM_STEPS + 1))

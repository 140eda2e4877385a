"""Steps of a recipe's own: the same on any ranks, exact after a resume on others; the examples of the docs."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Options, Recipe, Step, TensorData, UserError, fit
from tests.distributed.ranks import run_on_ranks
from tests.recipes import EXAMPLES, bits, example, final_tensors, losses, training_lines

COMMON = {"tracker": "none", "log_every": 1, "track_every": 1, "eval_every": 100, "max_grad_norm": 1.0}
NAMES = ("distillation", "gan", "preferences", "two_tower", "vae")  # test_streams.py and test_examples.py run others
SHARDED = ("distillation", "gan", "two_tower")
SMALL = {"max_steps": 3, "global_batch_size": 28, "micro_batch_size": 4}
"""Seven micro-batches, which neither 2 nor 3 ranks divide evenly."""


def _run(name: str, folder: Path, **options: Any) -> None:
    fit(example(name), **{**COMMON, **SMALL, **options, "output_dir": folder})


def _run_all(runs: list[tuple[str, Path, dict[str, Any]]]) -> None:
    """Run several, one after another. All ranks."""
    for name, folder, options in runs:
        _run(name, folder, **options)


def _assert_same(one: Path, other: Path) -> None:
    for mine, theirs in zip(training_lines(one), training_lines(other), strict=True):
        numbers = {key: value for key, value in mine.items() if isinstance(value, float)}
        assert {key: theirs[key] for key in numbers} == pytest.approx(numbers, rel=1e-6, abs=1e-6)
        assert numbers.keys() == {key for key, value in theirs.items() if isinstance(value, float)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every example on one rank and two, some on three with shards; and resumes on others."""
    root = tmp_path_factory.mktemp("runs")
    teacher = {"teacher": str(root / "teacher"), "teacher_width": 32}
    own: dict[str, dict[str, Any]] = {"distillation": teacher, "gan": {"critic_updates": 2}}
    one = [("distillation", root / "teacher", {"width": 32})]
    one += [(name, root / f"{name}-1", own.get(name, {})) for name in NAMES]
    two = [(name, root / f"{name}-2", {**own.get(name, {}), "strategy": "ddp"}) for name in NAMES]
    three = [(name, root / f"{name}-3", {**own.get(name, {}), "strategy": "fsdp2"}) for name in SHARDED]
    for name, folder in (("gan", "stopped"), ("two_tower", "stopped_too")):
        one += [(name, root / folder, {**own.get(name, {}), **stop}) for stop in ({"stop_at_step": 2}, {})]
    two += [("gan", root / "moved", {**own["gan"], "stop_at_step": 1, "strategy": "fsdp2"})]
    three += [("gan", root / "moved", {**own["gan"], "stop_at_step": 2, "strategy": "ddp"})]
    for ranks, each in ((1, one), (2, two), (3, three), (1, [("gan", root / "moved", own["gan"])])):
        run_on_ranks(ranks, _run_all, each)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_the_same_on_any_ranks(name: str, runs: Path) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80
    assert len(losses(runs / f"{name}-1")) == SMALL["max_steps"]
    for other in ("-2", *["-3"] * (name in SHARDED)):
        _assert_same(runs / f"{name}-1", runs / f"{name}{other}")


def test_resumes_have_the_state_of_all_optimizers(runs: Path) -> None:
    assert bits(runs / "stopped") == bits(runs / "gan-1")
    assert bits(runs / "stopped_too") == bits(runs / "two_tower-1")
    _assert_same(runs / "gan-1", runs / "moved")
    updates = {name: int(value) for name, value in final_tensors(runs / "moved").items() if name.startswith("step/")}
    assert sorted(set(updates.values())) == [3, 6], updates


class Divided(Recipe):
    """Ranks that make other updates: what decides on them is the rank."""

    options: Options

    def datasets(self) -> Mapping[str, Any]:
        return {"train": TensorData(inputs=torch.ones(64, 3), labels=torch.zeros(64, dtype=torch.int64))}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs.square().sum()

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
        parts: dict[str, list[nn.Parameter]] = {"0": [], "1": []}
        for name, parameter in parameters:
            parts[name[0]].append(parameter)
        return {name: torch.optim.SGD(its, lr=0.1) for name, its in parts.items()}

    def step(self, step: Step) -> None:
        step.update(optimizer=str(int(self.moment.step and int(os.environ["RANK"]) == 1)))


def _refused(folder: Path, strategy: str) -> str:
    """Return the error of a run that goes wrong. All ranks."""
    with pytest.raises(UserError) as raised:
        fit(Divided, **{**COMMON, **SMALL}, output_dir=folder, strategy=strategy)
    return str(raised.value)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_that_make_other_updates_are_found(strategy: str, tmp_path: Path) -> None:
    for found in run_on_ranks(2, _refused, tmp_path, strategy):
        assert "the ranks do not make the same updates" in found
        assert "step 2" in found

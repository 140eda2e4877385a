"""Habits of user code, such as random transforms and annealing: the same on any ranks, exact after a resume."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, random_split

from shardlaunch import Options, Recipe, UserError, fit, option
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NUM_CLASSES, NUM_FEATURES, final_tensors, losses, run_quietly, run_well, training_lines

ARGV = ["--max-steps", "6", "--lr", "0.05", "--threads-per-rank", "1", "--epochs", "2"]


class Flickering(Dataset[Any]):
    """Rows that are drawn anew at each look, from all three global generators."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x = torch.full((NUM_FEATURES,), float(index % 7))
        x = x.flip(0) if random.random() < 0.5 else x
        x = x + 0.3 * torch.randn(NUM_FEATURES) + 0.3 * torch.from_numpy(np.random.rand(NUM_FEATURES)).float()
        return x, index % NUM_CLASSES


@dataclass(kw_only=True)
class HabitOptions(Options):
    """Options of the recipe of habits."""

    global_batch_size: int = 16
    micro_batch_size: int = 4
    tracker: str = option("none", mark="free")


class Habits(Recipe):
    """Random rows, a random split, a random collate, numbers drawn in forward, and a weight that anneals."""

    options: HabitOptions

    def datasets(self) -> Mapping[str, Any]:
        train, held_out = random_split(Flickering(), [70, 20])  # without a generator, as in most tutorials
        return {"train": train, "eval": held_out}

    def model(self) -> nn.Module:
        return nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        batch = super().collate(samples, seeds)
        noise = 0.1 * self.moment.progress if seeds is not None else 0.0
        return {"inputs": batch.inputs + noise * torch.rand(1) + noise * random.random(), "labels": batch.labels}

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        outputs: torch.Tensor = model(batch["inputs"])
        return outputs + 0.1 * np.random.rand() if model.training else outputs

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        assert self.moment.is_evaluation != torch.is_grad_enabled() or not self.moment.step
        temperature = 2.0 - self.moment.progress if not self.moment.is_evaluation else 1.0
        smoothing = 0.1 * self.moment.epoch if not self.moment.is_evaluation else 0.0
        return nn.functional.cross_entropy(
            outputs / temperature, batch["labels"], reduction="sum", label_smoothing=smoothing
        )


def _run(argvs: list[list[str]]) -> None:
    for argv in argvs:
        run_well(Habits, argv)


def test_habits_are_the_same_on_any_ranks_with_workers_and_after_a_resume(tmp_path: Path) -> None:
    def argv(name: str, *words: str) -> list[str]:
        return [*ARGV, "--output-dir", str(tmp_path / name), *words]

    run_on_ranks(1, _run, [argv("one"), argv("resumed", "--stop-at-step", "3"), argv("resumed", "--num-workers", "2")])
    run_on_ranks(2, _run, [argv("two"), argv("fsdp2", "--strategy", "fsdp2")])
    expected = losses(tmp_path / "one")
    assert len(set(expected.values())) == 6
    assert losses(tmp_path / "resumed") == expected, "a resume is exact to the bit"
    assert all(
        torch.equal(tensor, final_tensors(tmp_path / "resumed")[key])
        for key, tensor in final_tensors(tmp_path / "one").items()
    )
    evaluations = [line["eval/loss"] for line in training_lines(tmp_path / "one") if "eval/loss" in line]
    for name in ("two", "fsdp2"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=2e-6), name
        found = [line["eval/loss"] for line in training_lines(tmp_path / name) if "eval/loss" in line]
        assert found == pytest.approx(evaluations, abs=2e-6)


class OwnGenerator(Flickering):
    """Rows from a generator that the data set keeps."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.generator.random(NUM_FEATURES)).float(), index % NUM_CLASSES


class Counting(Flickering):
    """Rows that depend on how many were read before."""

    read = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        return torch.full((NUM_FEATURES,), float(self.read)), index % NUM_CLASSES


class SeededByTorch(OwnGenerator):
    """The remedy that the message names."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.generator = np.random.default_rng(torch.initial_seed())
        return super().__getitem__(index)


def _of(dataset: type[Flickering]) -> type[Habits]:
    return type("_", (Habits,), {"datasets": lambda self: {"train": dataset()}, "__module__": __name__})


def test_rows_that_differ_at_a_second_look_are_named(tmp_path: Path) -> None:
    for dataset in (OwnGenerator, Counting):
        with pytest.raises(UserError, match=r"the train data is not the same at a second look: row 0, 12, "):
            fit(_of(dataset), max_steps=1, output_dir=str(tmp_path / "no"))
    fit(_of(SeededByTorch), max_steps=1, output_dir=str(tmp_path / "yes"))


class Forgetful(Habits):
    """The annealed weight is kept in the recipe, which no checkpoint holds."""

    seen = 0

    def schedule(self, step: int, num_steps: int) -> float:
        self.seen = step + 1
        return 1.0

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) * (1 + self.seen)


class Thawing(Habits):
    """A layer is frozen by hand in the middle of a run."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if self.moment.step == 3:
            self.net.bias.requires_grad_(False)
        return super().loss(outputs, batch)

    def model(self) -> nn.Module:
        self.net = super().model()
        return self.net


def test_parameters_that_are_frozen_by_hand_are_named(tmp_path: Path) -> None:
    status, output = run_quietly(Thawing, [*ARGV, "--save-every", "2", "--output-dir", str(tmp_path / "run")])
    assert status == 2, output
    assert "error: requires_grad of bias was changed during training" in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


class Hooked(Habits):
    """The gradient of a parameter goes through a hook, and its attribute says how it is optimized."""

    after: bool = False

    def model(self) -> nn.Module:
        model = super().model()
        parameter = nn.Parameter(model.bias.detach().clone())
        parameter.slow = True  # type: ignore[attr-defined]
        parameter.register_hook(lambda gradient: gradient.clamp(-1, 1))
        if self.after:
            parameter.register_post_accumulate_grad_hook(lambda parameter: None)
        model.bias = parameter
        return model


class HookedAfter(Hooked):
    """The hook sees sums of gradients."""

    after = True


@pytest.mark.parametrize(
    ("recipe_type", "strategy", "message"),
    [
        (Hooked, "fsdp2", "FSDP2 replaces parameters by shards, which have no gradient of a whole one for the hook of"),
        (Hooked, "zero3", "ZeRO 3 replaces parameters by shards"),
        (HookedAfter, "single", "a hook sees the gradient of bias after it was added to those of a rank's earlier"),
        (HookedAfter, "fsdp2", "a hook sees the gradient of bias after it was added"),
    ],
)
def test_hooks_on_gradients_that_ranks_would_change_are_refused(
    recipe_type: type[Recipe], strategy: str, message: str, tmp_path: Path
) -> None:
    argv = [*ARGV, "--strategy", strategy, "--output-dir", str(tmp_path / "run")]
    ((status, output),) = run_on_ranks(1, run_quietly, recipe_type, argv)
    assert status == 2, output
    assert message in output


class Recurrent(nn.Module):
    """A net with a recurrent layer, which keeps weak references to its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(NUM_FEATURES, NUM_CLASSES, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(inputs[:, None])[0][:, 0] * self.scale
        return outputs


class Slowed(Habits):
    """An attribute of a parameter chooses its learning rate, as µP and others do."""

    def model(self) -> nn.Module:
        model = Recurrent()
        for parameter in (model.scale, model.layer.bias_hh_l0):
            parameter.slow = True
        return model

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": 0.0 if getattr(p, "slow", False) else 0.1} for _, p in parameters]
        return torch.optim.SGD(groups, lr=0.1)


def test_attributes_of_parameters_are_there_under_every_strategy(tmp_path: Path) -> None:
    run_well(Slowed, [*ARGV, "--output-dir", str(tmp_path / "single")])
    for strategy in ("fsdp2", "zero3"):
        run_on_ranks(2, run_well, Slowed, [*ARGV, "--strategy", strategy, "--output-dir", str(tmp_path / strategy)])
        assert losses(tmp_path / strategy) == pytest.approx(losses(tmp_path / "single"), rel=1e-6), strategy


class CountingNet(Habits):
    """The count is kept in a module."""

    def model(self) -> nn.Module:
        model = super().model()
        model.calls = 0

        def count(module: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
            module.calls += module.training
            return outputs * (1 + module.calls)

        model.register_forward_hook(count)
        return model


def test_state_that_a_recipe_keeps_is_found(tmp_path: Path) -> None:
    def said(recipe_type: type[Recipe]) -> str:
        words = [*ARGV, "--check", "--stop-at-step", "1", "--output-dir", str(tmp_path / recipe_type.__name__)]
        status, output = run_quietly(recipe_type, words)
        assert status == 0, output
        return output

    assert "does not resume exactly" in (output := said(Forgetful))
    assert "From step 1 to step 2 these change: the recipe's seen (1 -> 2)." in output
    assert "self.moment" in output
    assert "the model's calls (4 -> 8)" in said(CountingNet)
    assert "resumed after step 1, step 2 is the same" in said(Habits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CountingNet", "Forgetful", "Habits"]

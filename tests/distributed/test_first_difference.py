"""A fault that is planted in a step is found: the right step, micro-batch, stage, tensor and module are named.

Each fault is in one run of two that are compared, at step 2, and in the third micro-batch if it is of one.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, fit
from shardlaunch.launcher.commands.first_difference import first_difference, num_recorded
from shardlaunch.launcher.training import recording, updates
from shardlaunch.launcher.training.batches import Batches, MicroBatch, Slot
from shardlaunch.sharding.exact import Units
from tests.distributed.ranks import run_on_ranks

STEP, MICRO_BATCH = 2, 3
_fault = ""
_now = (0, 0)  # step and micro-batch, from 1


def _is_here(fault: str, *, micro_batch: bool = True) -> bool:
    return _fault == fault and _now == (STEP, MICRO_BATCH if micro_batch else _now[1])


def _noise(values: torch.Tensor) -> torch.Tensor:
    return 1e-6 * torch.rand(values.shape, generator=torch.Generator().manual_seed(os.getpid()))


class _Backward(torch.autograd.Function):
    """Hands its values on; its gradient is noisy where that is planted."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient + _noise(gradient) if _is_here("backward") else gradient


class Unsteady(nn.Module):
    """A layer that may be noisy in either pass."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = _Backward.apply(values)
        return values + _noise(values) if _is_here("forward") else values


class Block(nn.Module):
    """Modules, and operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.unsteady = Unsteady()
        self.last = nn.Linear(8, 8)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(values)).relu()
        if _is_here("between"):
            hidden = hidden + _noise(hidden)
        result: torch.Tensor = hidden + self.last(F.dropout(self.unsteady(hidden), 0.1, self.training))
        return result


class Net(nn.Module):
    """A block, a parameter without dimensions, a frozen and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(8, 3)
        self.tied = nn.Linear(8, 3)
        self.tied.weight = self.head.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        if _fault == "start":
            nn.init.normal_(self.head.bias, generator=torch.Generator().manual_seed(os.getpid()))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.block(values) * self.scale
        result: torch.Tensor = self.head(hidden) + self.tied(hidden) + self.frozen.sum()
        return result


class Drifting(torch.optim.AdamW):
    """AdamW, which drifts on one rank where that is planted."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        if _is_here("update", micro_batch=False) and os.environ.get("RANK", "0") == os.environ["DRIFTS"]:
            self.param_groups[0]["params"][2].data.add_(1e-6)


class Faulty(Recipe):
    """Classify points."""

    options: Options

    def datasets(self) -> Mapping[str, Any]:
        points = torch.rand(48, 6, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=points, labels=(3 * points[:, 0]).long())}

    def model(self) -> nn.Module:
        return Net()

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(outputs.float(), batch["labels"], reduction="sum")
        return loss + _noise(loss) if _is_here("loss") else loss

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return Drifting([parameter for _, parameter in parameters], lr=0.01)


def _run_all(faults: list[str], folder: Path, options: dict[str, Any]) -> None:
    """Run once with each fault, in a folder of its name. All ranks."""
    global _fault
    seed, load, gradient = updates.seed_model_stream, Batches.load, Units.gradient

    def seed_here(run_seed: int, step: int, index: int, device: torch.device) -> None:
        global _now
        _now = (step + 1, index + 1)
        seed(run_seed, step, index, device)

    def load_here(self: Batches, slot: Slot) -> MicroBatch:
        micro_batch = load(self, slot)
        if _fault == "batch" and (slot.step + 1, slot.micro_batch + 1) == (STEP, MICRO_BATCH):
            micro_batch.inputs["inputs"] = micro_batch.inputs["inputs"] + 1e-6
        return micro_batch

    def gradient_here(self: Units, number: int, sums: torch.Tensor, out: torch.Tensor) -> None:
        gradient(self, number, sums, out)
        if _is_here("sum", micro_batch=False) and self._names[number] == "block.last.weight":
            out.mul_(1 + 2**-23 * int(os.environ["WORLD_SIZE"]))  # a float sum, say, whose bits depend on the ranks

    updates.seed_model_stream, Batches.load, Units.gradient = seed_here, load_here, gradient_here  # type: ignore
    os.environ[recording.RECORD_VARIABLE] = "1"
    os.environ["DRIFTS"] = str(int(os.environ["WORLD_SIZE"]) - 1)
    common = {"max_steps": 3, "global_batch_size": 16, "micro_batch_size": 4, "tracker": "none", "exact": True}
    for _fault in faults:
        fit(Faulty, output_dir=folder / (_fault or SOUND), **common | options)


SOUND = "sound"
FAULTS: dict[str, tuple[str, int | None, str, str]] = {
    "start": ("before the first step", None, "head.bias", ""),
    "batch": ("batch", 3, "the batch['inputs']", "collate() or the data"),
    "forward": ("forward", 3, "the output of block.unsteady", "block.unsteady (Unsteady)"),
    "between": ("forward", 3, "the input [0] of block.unsteady", "block (Block)"),
    "loss": ("forward", 3, "the loss", "loss()"),
    "backward": ("backward", 3, "the gradient of an input of block.unsteady", "block.unsteady (Unsteady)"),
    "sum": ("sum", None, "the gradient of block.last.weight", ""),
    "update": ("update", None, "block.first.bias", ""),
}


RUNS = {
    ("single", 1): ["", *(fault for fault in FAULTS if fault not in ("sum", "update"))],
    ("ddp", 2): ["sum", "update"],
    ("fsdp2", 3): ["", "backward"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of the runs of each strategy."""
    parent = tmp_path_factory.mktemp("runs")
    for (strategy, num_ranks), faults in RUNS.items():
        run_on_ranks(num_ranks, _run_all, faults, parent / strategy, {"strategy": strategy})
    return {strategy: parent / strategy for strategy, _ in RUNS}


@pytest.mark.parametrize(
    ("strategy", "fault"), [(strategy, fault) for (strategy, _), faults in RUNS.items() for fault in faults if fault]
)
def test_what_differs_first_is_named(strategy: str, fault: str, folders: dict[str, Path]) -> None:
    found = first_difference(folders["single"] / SOUND, folders[strategy] / fault)
    assert found is not None
    assert (found.stage, found.micro_batch, found.what, found.where) == FAULTS[fault]
    assert found.step == (1 if fault == "start" else STEP)
    assert found.how == (" (rank 1 has other values than rank 0)" if fault == "update" else "")


def test_the_same_bits_have_no_difference(folders: dict[str, Path]) -> None:
    assert first_difference(folders["single"] / SOUND, folders["fsdp2"] / SOUND) is None
    assert num_recorded(folders["single"] / SOUND) == num_recorded(folders["fsdp2"] / SOUND)
    assert num_recorded(folders["single"] / SOUND)[0] == 3


def test_what_only_one_run_has_is_a_difference(folders: dict[str, Path], tmp_path: Path) -> None:
    (record,) = (folders["single"] / SOUND / recording.RECORDS).iterdir()
    lines = record.read_text().splitlines(keepends=True)
    for name, kept in (("shorter", [line for line in lines if not line.startswith("[3,")]), ("other", lines[:-1])):
        (tmp_path / name / recording.RECORDS).mkdir(parents=True)
        (tmp_path / name / recording.RECORDS / record.name).write_text("".join(kept))
        for both in ((folders["single"] / SOUND, tmp_path / name), (tmp_path / name, folders["single"] / SOUND)):
            found = first_difference(*both)
            assert found is not None
            assert found.step == 3
            assert found.how == f" (only the {'first' if both[1].name == name else 'second'} run has it)"

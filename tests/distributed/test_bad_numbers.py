"""Steps with bad losses are skipped, or a run goes back without them: the same on any ranks, and after a resume."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from shardlaunch import Options, Recipe, TensorData, UserError, fit, option
from shardlaunch.checkpoints.reader import checkpoint_steps
from tests.distributed.ranks import run_on_ranks
from tests.recipes import final_tensors, training_lines

NUM_STEPS = 40


@dataclass(kw_only=True)
class BadOptions(Options):
    """A small run of 40 steps."""

    global_batch_size: int = 32
    micro_batch_size: int = 8
    max_steps: int = NUM_STEPS
    save_every: int = option(10, mark="free")
    keep: int = option(0, mark="free")
    lr: float = 0.001
    tracker: str = option("none", mark="free")
    bad_steps: tuple[int, ...] = option((), mark="free")
    """Steps of a bad loss."""
    factor: float = option(math.nan, mark="free")
    """What the loss of one of their micro-batches is multiplied with."""


class BadRecipe(Recipe):
    """A classifier with dropout and batch norm, some of whose losses are bad."""

    options: BadOptions

    def datasets(self) -> dict[str, Any]:
        inputs = torch.rand(256, 4, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=inputs, labels=(inputs.sum(1) > 2).long())}

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2)
        )

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")
        return loss * self.options.factor if self.moment.step + 1 in self.options.bad_steps else loss


def _run(output_dir: Path, recipe: type[Recipe] = BadRecipe, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it goes back
        fit(recipe, output_dir=str(output_dir), **options)


def _run_on_rank(output_dir: Path, options: dict[str, Any]) -> None:
    _run(output_dir, **options)


def _assert_same(one: Path, other: Path) -> None:
    assert training_lines(one) == training_lines(other)
    expected = final_tensors(one)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in final_tensors(other).items())


def _assert_close(one: Path, other: Path) -> None:
    """The same run but for rounding: the same steps are left out, and losses agree to 1e-6."""
    for a, b in zip(training_lines(one), training_lines(other), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "grad_norm"}:
            assert a[name] == pytest.approx(b[name], abs=1e-6, nan_ok=True)
        assert a.get("left_out") == b.get("left_out")


SKIP = {"on_nonfinite": "skip", "bad_steps": (13, 14, 27)}
BACK = {"on_nonfinite": "rollback", "bad_steps": (13, 27), "leave_out": 2}
SPIKE = {"on_spike": "rollback", "bad_steps": (33,), "factor": 100.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [(SKIP, ([13, 14, 27], [])), (BACK, ([], [12, 13, 26, 27])), (SPIKE, ([], [33]))],
    ids=["skip", "rollback", "spike"],
)
def test_the_same_on_any_ranks_and_after_a_resume(
    options: dict[str, Any], expected: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    _run(tmp_path / "one", **options)
    lines = training_lines(tmp_path / "one")
    assert [line["step"] for line in lines if "loss" in line or "left_out" in line] == list(range(1, NUM_STEPS + 1))
    left_out = [line["step"] for line in lines if "left_out" in line]
    skipped = [line["step"] for line in lines if line.get("skipped")]
    assert (skipped, left_out) == expected
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path / "one").values())
    for stop_at_step in (11, 17, 30):  # between, it goes back to a step before the stop
        _run(tmp_path / "resumed", stop_at_step=stop_at_step, **options)
    _run(tmp_path / "resumed", **options)
    _assert_same(tmp_path / "one", tmp_path / "resumed")
    for strategy in ("ddp", "fsdp2"):
        run_on_ranks(2, _run_on_rank, tmp_path / strategy, {"strategy": strategy, **options})
        _assert_close(tmp_path / "one", tmp_path / strategy)


class _Crash(Exception):
    pass


class CrashingRecipe(BadRecipe):
    """Its loss is bad once, and then the process crashes before it has saved again."""

    losses_at_12: ClassVar[int] = 0

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        loss = super().loss(outputs, batch)
        if self.moment.step == 21 and self.losses_at_12 == 4:
            return loss * math.nan
        if self.moment.step == 12:
            type(self).losses_at_12 += 1
            if self.losses_at_12 == 8:
                raise _Crash
        return loss


def test_what_is_left_out_is_remembered_and_what_was_trained_on_it_goes(tmp_path: Path) -> None:
    options = {"on_nonfinite": "rollback", "leave_out": 4}
    _run(tmp_path / "expected", bad_steps=(22,), **options)
    run_dir = tmp_path / "run"
    with pytest.raises(_Crash):
        _run(run_dir, CrashingRecipe, **options)
    assert checkpoint_steps(run_dir / "checkpoints") == [10], "that of step 20 was trained on what is left out"
    record = json.loads((run_dir / "run.json").read_text())
    assert [(each["first"], each["last"]) for each in record["left_out"]] == [(19, 22)]
    _run(run_dir, CrashingRecipe, **options)
    _assert_same(tmp_path / "expected", run_dir)


def test_back_to_the_beginning(tmp_path: Path) -> None:
    """There is no checkpoint before what is left out; and then there is one that knows of it."""
    options = {"on_nonfinite": "rollback", "bad_steps": (3, 4, 15)}
    _run(tmp_path / "run", **options)
    lines = training_lines(tmp_path / "run")
    assert [line["step"] for line in lines if "left_out" in line] == [3, 4, 15]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000020"
    _run(tmp_path / "other", resume=str(checkpoint), **options)
    expected = final_tensors(tmp_path / "run")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in final_tensors(tmp_path / "other").items())


def test_too_many_rollbacks(tmp_path: Path) -> None:
    """All steps from one on, with checkpoints between; and every other step, without."""
    options: dict[str, Any] = {"on_nonfinite": "rollback", "keep": 2}
    with pytest.raises(UserError, match=r"step 15: .*10 rollbacks before have not helped"):
        _run(tmp_path / "all", bad_steps=tuple(range(5, 40)), save_every=4, **options)
    with pytest.raises(UserError, match=r"step 23: .*10 rollbacks before have not helped"):
        _run(tmp_path / "some", bad_steps=tuple(range(3, 40, 2)), save_every=0, **options)

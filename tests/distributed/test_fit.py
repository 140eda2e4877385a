"""`fit` on several ranks: repeated runs, all strategies, errors, initial weights, extended runs."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardlaunch import UserError, fit
from tests.distributed.ranks import run_on_ranks
from tests.recipes import LinearNet, NetRecipe, losses

SHORT: dict[str, Any] = {"max_steps": 3, "threads_per_rank": 1, "tracker": "none"}


def _sweep(folder: Path) -> list[Any]:
    results = []
    for strategy in ("ddp", "fsdp2", "zero2", "zero3", "ddp"):
        result = fit(LinearNet, strategy=strategy, output_dir=folder / f"{len(results)}-{strategy}", **SHORT)
        results.append(result)
        assert not dist.is_initialized()
    return results


def test_a_sweep_over_strategies_in_the_same_processes(tmp_path: Path) -> None:
    one, two = run_on_ranks(2, _sweep, tmp_path)
    assert one == two
    expected = losses(one[0].run_dir)
    for result in one:
        assert result.step == 3
        assert losses(result.run_dir) == pytest.approx(expected, abs=1e-6)


def _join(folder: Path) -> Any:
    """Call `fit` in a script that has its own process group and uses it afterwards."""
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    results = [fit(NetRecipe, lr=lr, output_dir=folder / str(lr), **SHORT) for lr in (0.1, 0.01)]
    mine = torch.ones(1)
    dist.all_reduce(mine)
    dist.destroy_process_group()
    return mine.item(), [result.step for result in results]


def test_a_process_group_that_is_there_is_joined_and_stays(tmp_path: Path) -> None:
    assert run_on_ranks(2, _join, tmp_path) == [(2.0, [3, 3])] * 2


def _fail_and_go_on(folder: Path) -> tuple[str, int]:
    with pytest.raises(UserError) as error:
        fit(NetRecipe, output_dir=folder / "nosuch", init_from=folder / "nothing", **SHORT)
    return str(error.value), fit(NetRecipe, output_dir=folder / "run", **SHORT).step


def test_an_error_is_raised_on_all_ranks_and_the_next_run_goes_well(tmp_path: Path) -> None:
    answers = run_on_ranks(2, _fail_and_go_on, tmp_path)
    assert len(set(answers)) == 1
    assert answers[0][1] == 3
    assert "--init-from" in answers[0][0]


class OneFails(NetRecipe):
    """A recipe whose loss() fails on rank 1, in the second step."""

    num_losses = 0

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        self.num_losses += 1
        if self.num_losses > 4 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("on rank 1 only")
        return super().loss(outputs, batch)


def _fail_on_one_rank(folder: Path) -> tuple[str, int, int]:
    num_threads = threading.active_count()
    with pytest.raises((ZeroDivisionError, RuntimeError)) as error:
        fit(OneFails, output_dir=folder / "run", **SHORT)
    assert not dist.is_initialized()
    result = fit(NetRecipe, output_dir=folder / "run", **SHORT)
    return error.typename, result.step, threading.active_count() - num_threads


def test_an_error_on_one_rank_ends_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert run_on_ranks(2, _fail_on_one_rank, tmp_path) == [("RuntimeError", 3, 0), ("ZeroDivisionError", 3, 0)]


def _start_from_weights(folder: Path) -> list[Any]:
    source = fit(LinearNet, output_dir=folder / "source", seed=5, **SHORT)
    runs: dict[str, dict[str, Any]] = {
        "folds": {"folds": 2},
        **{strategy: {"strategy": strategy} for strategy in ("ddp", "fsdp2", "zero1", "zero3")},
    }
    results = {
        name: fit(LinearNet, output_dir=folder / name, init_from=source.run_dir, num_train=128, **options, **SHORT)
        for name, options in runs.items()
    }
    # A resume of such a run, from its path, with and without the option; and of a run that began with other weights.
    for number, options in enumerate(({"init_from": source.run_dir}, {})):
        paths: dict[str, Any] = {"output_dir": folder / f"resumed-{number}", "resume": str(folder / "ddp"), **options}
        assert fit(LinearNet, num_train=128, **paths, **SHORT).last_checkpoint == results["ddp"].last_checkpoint
    with pytest.raises(UserError, match="digest of the weights of --init-from: None -> "):
        fit(LinearNet, init_from=source.run_dir, resume=str(source.run_dir), seed=5, **SHORT)
    return [losses(results[name].run_dir) for name in ("ddp", "fsdp2", "zero1", "zero3")] + [
        [fold.step for fold in results["folds"].folds]
    ]


def test_init_from_with_folds_resume_and_sharded_strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = run_on_ranks(2, _start_from_weights, tmp_path)
    assert answers[0] == answers[1]
    ddp, *others, steps = answers[0]
    for other in others:
        assert other == pytest.approx(ddp, abs=1e-6)
    assert steps == [3, 3]


def _extend(folder: Path) -> list[tuple[str, Any, Any]]:
    options = {**SHORT, "eval_every": 1, "num_train": 128}
    kinds: dict[str, dict[str, Any]] = {
        "folds": {"folds": 2},
        "unfreeze": {"freeze": ("first.*",), "unfreeze_at_step": 2},
        "patience": {"early_stopping_patience": 5},
        "fp16": {"precision": "fp16"},
    }
    answers = []
    for name, more in kinds.items():
        fit(NetRecipe, output_dir=folder / name, **options, **more)
        extended = fit(NetRecipe, output_dir=folder / name, extend_to_steps=5, **options, **more)
        whole = fit(NetRecipe, output_dir=folder / f"{name}-whole", extend_to_steps=5, **options, **more)
        one, other = ([losses(r.run_dir) for r in result.folds or (result,)] for result in (extended, whole))
        assert extended.is_finished
        assert extended.step == whole.step == 5 * len(one)
        answers.append((name, one, other))
    return answers


def test_extending_a_run_is_the_run_that_is_longer_from_the_start(tmp_path: Path) -> None:
    for name, extended, whole in run_on_ranks(2, _extend, tmp_path)[0]:
        assert extended == whole, name
        assert len(extended[0]) == 5

"""`fit` on several ranks: it joins those that are there, again and again, under any strategy."""

import os
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
    """Call `fit` in a script that has a process group of its own, which goes on after it."""
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

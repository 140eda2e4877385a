"""Every strategy on one rank: the same run as `single`, reported at the start, and resumed on more ranks."""

import os
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from shardlaunch import Recipe
from shardlaunch.launcher.training import attention
from tests.distributed.ranks import run_on_ranks
from tests.recipes import MaskedBert, NetRecipe, final_tensors, losses, run_quietly, run_well

NUM_STEPS, SAVED = 12, 6
LOSS_BOUND = 1e-6
ARGV = [
    *("--max-steps", str(NUM_STEPS), "--save-every", str(SAVED), "--keep", "0"),
    *("--lr", "0.003", "--threads-per-rank", "1", "--tracker", "none"),
]
MOST_RANKS = {"ddp": 2, "fsdp2": 2, "hsdp": 4, "zero1": 2, "zero2": 2, "zero3": 2}
SAID = dict.fromkeys(MOST_RANKS, "one rank: nothing is sharded") | {"ddp": "one rank: no gradients to sum"}


def _run(recipe_type: type[Recipe], strategies: tuple[str, ...], folder: Path, *words: str) -> dict[str, str]:
    """Run under each strategy and return what the start says of it. All ranks."""
    said = {}
    for name in strategies:
        argv = [*ARGV, "--strategy", name, "--output-dir", str(folder / name), *words]
        with patch.object(attention, "LEAST_TOKENS", 1):  # also in the short sequences of MaskedBert
            lines = run_well(recipe_type, argv).splitlines()
        said[name] = next((line for line in lines if line.startswith("strategy")), "")
        assert not dist.is_initialized()
    return said


def _run_plainly(recipe_type: type[Recipe], strategies: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Do so in a process that no launcher has started, one run after the other."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return _run(recipe_type, strategies, folder)


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that runs a recipe under `single` and all others, and gives its folder and what was said."""

    @cache
    def plain_runs_of(recipe_type: type[Recipe]) -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp("plain")
        (said,) = run_on_ranks(1, _run_plainly, recipe_type, ("single", *MOST_RANKS), folder)
        return folder, said

    return plain_runs_of


def _largest_difference(one: Path, other: Path) -> float:
    expected, found = losses(one), losses(other)
    assert set(found) >= set(range(SAVED + 1, NUM_STEPS + 1))
    return max(abs(expected[step] - loss) for step, loss in found.items())


@pytest.mark.parametrize("recipe_type", [NetRecipe, MaskedBert])
def test_one_process_runs_the_same_run(recipe_type: type[Recipe], plain_runs: Any) -> None:
    folder, said = plain_runs(recipe_type)
    for name in MOST_RANKS:
        assert SAID[name] in said[name]
        assert _largest_difference(folder / "single", folder / name) <= LOSS_BOUND, name
    tensors, others = final_tensors(folder / "single"), final_tensors(folder / "ddp")
    assert all(tensors[key].equal(others[key]) for key in tensors | others)


def test_a_launched_group_of_one_is_the_same(plain_runs: Any, tmp_path: Path) -> None:
    folder, said = plain_runs(NetRecipe)
    (said_launched,) = run_on_ranks(1, _run, NetRecipe, tuple(MOST_RANKS), tmp_path)
    for name in MOST_RANKS:
        assert said_launched[name] == said[name]
        tensors, others = final_tensors(folder / name), final_tensors(tmp_path / name)
        assert all(tensors[key].equal(others[key]) for key in tensors | others)


@pytest.mark.parametrize("name", MOST_RANKS)
def test_a_run_shrinks_to_one_rank_and_grows_again(name: str, plain_runs: Any, tmp_path: Path) -> None:
    folder, _ = plain_runs(MaskedBert)
    saved = f"checkpoints/step-{SAVED:08d}"
    num_ranks = MOST_RANKS[name]
    run_on_ranks(num_ranks, _run, MaskedBert, (name,), tmp_path / "grown", "--resume", str(folder / name / saved))
    assert _largest_difference(folder / "single", tmp_path / "grown" / name) <= LOSS_BOUND
    run_on_ranks(num_ranks, _run, MaskedBert, (name,), tmp_path / "many")
    many = tmp_path / "many" / name / saved
    run_on_ranks(1, _run, MaskedBert, (name,), tmp_path / "shrunk", "--resume", str(many))
    assert _largest_difference(folder / "single", tmp_path / "shrunk" / name) <= LOSS_BOUND


def test_shards_that_do_not_fit_on_one_rank(tmp_path: Path) -> None:
    words = ["--strategy", "hsdp", "--shard-ranks", "2", "--output-dir", str(tmp_path)]
    ((status, output),) = run_on_ranks(1, run_quietly, NetRecipe, words)
    assert status == 2
    assert "hsdp: 1 rank cannot" in output

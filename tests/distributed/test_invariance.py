"""The same run on any number of ranks."""

from pathlib import Path

import pytest
import torch

from shardlaunch import Recipe
from shardlaunch.launcher.training import updates
from tests.distributed.ranks import run_on_ranks
from tests.recipes import FewReviews, NetRecipe, final_tensors, losses, run_well, save_small_bert, training_lines

LOSS_BOUND = 1e-6
WEIGHT_BOUND = 5e-5

NET = ["--max-steps", "50", "--lr", "0.003", "--eval-every", "25", "--threads-per-rank", "1"]
REVIEWS = [
    *("--preset", "demo", "--max-steps", "30", "--global-batch-size", "16", "--micro-batch-size", "2"),
    *("--max-length", "32", "--tracker", "none", "--threads-per-rank", "1"),
]


def _run_on(num_ranks: int, recipe_type: type[Recipe], argv: list[str], output_dir: Path) -> str:
    """Run, and return what rank 0 has printed."""
    said: str = run_on_ranks(num_ranks, run_well, recipe_type, [*argv, "--output-dir", str(output_dir)])[0]
    return said


def _weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in final_tensors(output_dir).items() if "/" not in key}


def _assert_same_run(one: Path, other: Path) -> None:
    expected, found = losses(one), losses(other)
    assert expected.keys() == found.keys()
    assert max(abs(expected[step] - found[step]) for step in expected) <= LOSS_BOUND
    weights, others = _weights(one), _weights(other)
    assert weights.keys() == others.keys()
    assert max((weights[key].double() - others[key].double()).abs().max().item() for key in weights) <= WEIGHT_BOUND
    evaluations = [[line for line in training_lines(folder) if "eval/loss" in line] for folder in (one, other)]
    for line, other_line in zip(*evaluations, strict=True):
        assert line["eval/accuracy"] == other_line["eval/accuracy"]
        assert line["eval/loss"] == pytest.approx(other_line["eval/loss"], abs=LOSS_BOUND)


@pytest.fixture(scope="module")
def net_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("net") / "one"
    _run_on(1, NetRecipe, NET, output_dir)
    return output_dir


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_net_with_batch_norm_and_dropout(num_ranks: int, net_run: Path, tmp_path: Path) -> None:
    _run_on(num_ranks, NetRecipe, NET, tmp_path)
    _assert_same_run(net_run, tmp_path)


@pytest.mark.parametrize("more", [(), ("--equal-work", "--micro-batch-size", "4", "--max-steps", "15")])
def test_bert_with_dropout(more: tuple[str, ...], tmp_path: Path) -> None:
    save_small_bert(tmp_path / "model")
    argv = [*REVIEWS, *more, "--model", str(tmp_path / "model")]
    for num_ranks in (1, 2, 4):
        said = _run_on(num_ranks, FewReviews, argv, tmp_path / str(num_ranks))
        assert (", equal work" in said) == bool(more), said
    _assert_same_run(tmp_path / "1", tmp_path / "2")
    _assert_same_run(tmp_path / "1", tmp_path / "4")


def _run_with_own_seed(argv: list[str]) -> None:
    """Run a rank that is wrong: it seeds its model by its rank."""
    import os

    seed = updates.seed_model_stream

    def seed_by_rank(run_seed: int, step: int, micro_batch: int, device: torch.device) -> None:
        seed(run_seed + int(os.environ["RANK"]), step, micro_batch, device)

    updates.seed_model_stream = seed_by_rank
    run_well(NetRecipe, argv)


def test_a_rank_that_seeds_itself_is_noticed(net_run: Path, tmp_path: Path) -> None:
    run_on_ranks(2, _run_with_own_seed, [*NET, "--output-dir", str(tmp_path)])
    with pytest.raises(AssertionError):
        _assert_same_run(net_run, tmp_path)

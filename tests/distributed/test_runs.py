"""Other promises of a run: retention, best metric, early stopping, loss scale, workers, evaluation on odd sizes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import checkpoint_steps, open_checkpoint
from shardlaunch.launcher.runs.model import build_model
from shardlaunch.launcher.toolkit.metrics import CLASSIFICATION
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.gradients import GradientBuckets
from shardlaunch.sharding.world import connect, disconnect
from tests.distributed.ranks import run_on_ranks
from tests.recipes import (
    FewReviews,
    LinearNet,
    NetOptions,
    NetRecipe,
    PickyNet,
    RankedNet,
    UnseededNet,
    final_tensors,
    run_quietly,
    run_well,
    save_small_bert,
    training_lines,
)

BASE = ["--max-steps", "12", "--lr", "0.003", "--threads-per-rank", "1"]


def _run(num_ranks: int, output_dir: Path, *options: str) -> str:
    (output, *_) = run_on_ranks(num_ranks, run_well, NetRecipe, [*BASE, *options, "--output-dir", str(output_dir)])
    assert isinstance(output, str)
    return output


def _evaluations(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in training_lines(output_dir) if "eval/loss" in line]


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    _run(2, tmp_path, "--save-every", "2", "--keep", "2", "--save-on-best", "--eval-every", "3", "--lr", "1.0")
    accuracies = {line["step"]: line["eval/accuracy"] for line in _evaluations(tmp_path)}
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert checkpoint_steps(tmp_path / "checkpoints") == sorted({best, *sorted({2, 4, 6, 8, 10, 12, best})[-2:]})
    state = open_checkpoint(tmp_path / "checkpoints" / "step-00000012", peers=Peers()).position
    assert (state.best_step, state.best_value) == (best, accuracies[best])


def test_early_stopping_ends_the_run_for_good(tmp_path: Path) -> None:
    options = ("--eval-every", "1", "--early-stopping-patience", "2", "--lr", "1e-12")
    _run(2, tmp_path, *options)
    assert [line["step"] for line in _evaluations(tmp_path)] == [1, 2, 3], "the first is the best, two are not better"
    assert "this run is complete: 3 of 12 steps" in _run(1, tmp_path, *options)


def test_evaluation_counts_every_sample_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    for num_eval in (1, 3, 41):  # 41: the last batch has 3 micro-batches, so that some rank has none of its own
        found = []
        for num_ranks in (1, 2, 4):
            folder = tmp_path / f"{num_eval}-{num_ranks}"
            more = ("--eval-micro-batch-size", "8") if num_ranks == 2 else ()
            _run(num_ranks, folder, "--num-eval", str(num_eval), "--max-steps", "1", *more)
            found += _evaluations(folder)
        assert len({line["eval/accuracy"] for line in found}) == 1
        assert found[0]["eval/accuracy"] * num_eval == pytest.approx(round(found[0]["eval/accuracy"] * num_eval))
        assert [line["eval/loss"] for line in found] == pytest.approx([found[0]["eval/loss"]] * 3, abs=1e-6)


def test_options_that_change_only_the_speed(tmp_path: Path) -> None:
    _run(1, tmp_path / "plain")
    _run(1, tmp_path / "workers", "--num-workers", "2")
    assert training_lines(tmp_path / "workers") == training_lines(tmp_path / "plain")
    few = ("--num-workers", "1", "--log-every", "5", "--save-every", "1", "--keep", "0", "--eval-every", "0")
    _run(1, tmp_path / "few", *few)
    tensors, others = final_tensors(tmp_path / "plain"), final_tensors(tmp_path / "few")
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert [line["step"] for line in training_lines(tmp_path / "few") if "loss" in line] == [5, 10, 12]


def test_a_batch_larger_than_the_data_and_ranks_without_work(tmp_path: Path) -> None:
    for num_ranks in (1, 4):
        _run(num_ranks, tmp_path / str(num_ranks), "--num-train", "7", "--global-batch-size", "8", "--max-steps", "4")
    pairs = zip(training_lines(tmp_path / "1"), training_lines(tmp_path / "4"), strict=True)
    for expected, found in pairs:
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-5)


def _run_with_overflows(argv: list[str]) -> str:
    """Run a rank whose gradients overflow in the first three steps."""
    norm = GradientBuckets.norm
    calls = iter(range(1000))
    GradientBuckets.norm = lambda self: float("inf") if next(calls) < 3 else norm(self)  # type: ignore[method-assign]
    return run_well(NetRecipe, argv)


def test_an_overflow_skips_the_update_and_the_step_goes_on(tmp_path: Path) -> None:
    argv = [*BASE, "--precision", "fp16", "--output-dir", str(tmp_path)]
    run_on_ranks(2, _run_with_overflows, argv)
    lines = [line for line in training_lines(tmp_path) if "loss" in line]
    assert [bool(line.get("skipped")) for line in lines] == [True] * 3 + [False] * 9
    assert final_tensors(tmp_path)["step/last.bias"].item() == 9, "Adam's own step counts applied updates"
    state = open_checkpoint(tmp_path / "checkpoints" / "step-00000012", peers=Peers()).position
    assert state.loss_scale == {"value": 65536.0 / 8, "good_steps": 9}


def test_the_loss_scale_goes_on_at_a_resume(tmp_path: Path) -> None:
    argv = [*BASE, "--precision", "fp16", "--output-dir", str(tmp_path)]
    run_on_ranks(2, _run_with_overflows, [*argv, "--stop-at-step", "5"])
    run_on_ranks(2, run_well, NetRecipe, argv)
    state = open_checkpoint(tmp_path / "checkpoints" / "step-00000012", peers=Peers()).position
    assert state.loss_scale == {"value": 65536.0 / 8, "good_steps": 9}


def test_fp16_resumes_bit_identically(tmp_path: Path) -> None:
    _run(2, tmp_path / "whole", "--precision", "fp16")
    _run(2, tmp_path / "parts", "--precision", "fp16", "--stop-at-step", "5")
    _run(2, tmp_path / "parts", "--precision", "fp16")
    assert training_lines(tmp_path / "whole") == training_lines(tmp_path / "parts")
    tensors, others = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def test_tied_and_unreached_parameters(tmp_path: Path) -> None:
    _run(2, tmp_path)
    tensors = final_tensors(tmp_path)
    assert "middle.weight" in tensors
    assert "tied.weight" not in tensors
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert manifest["aliases"] == {"tied.weight": "middle.weight"}
    # The loss never reaches it: its gradient is zero, weight decay and AdamW's step count go on.
    assert not tensors["exp_avg/never"].any()
    assert tensors["step/never"].item() == 12


def _main_first_with_failing_main() -> str:
    world = connect(read_environment())
    try:
        world.main_first(lambda: _fail_on_main(world.rank))
    except ValueError as error:
        return str(error)
    finally:
        disconnect(world)
    return "no error"


def _fail_on_main(rank: int) -> None:
    if rank == 0:
        raise OSError(28, "No space left on device", "cache")


def _asks_late() -> bool:
    world = connect(read_environment())
    if not world.is_main:
        time.sleep(1)
    is_first = world.is_first_to("deed")
    world.await_others_at("deed", most_s=60)
    return is_first


def test_a_rank_that_is_late_finds_that_another_has_spoken() -> None:
    assert run_on_ranks(2, _asks_late) == [True, False]


def test_metrics_are_exact_across_ranks_also_where_one_has_no_evaluation_data(tmp_path: Path) -> None:
    found = []
    for num_ranks in (1, 2, 4):
        argv = [*BASE, "--num-eval", "6", "--output-dir", str(tmp_path / str(num_ranks))]
        (output, *_) = run_on_ranks(num_ranks, run_well, RankedNet, argv)
        assert "confusion_matrix" in output
        found.append(_evaluations(tmp_path / str(num_ranks)))
    for lines in found[1:]:
        for line, expected in zip(lines, found[0], strict=True):
            assert line["eval/auroc"] == pytest.approx(expected["eval/auroc"], abs=1e-6)
            for name in (*CLASSIFICATION, "errors", "labels"):
                assert line[f"eval/{name}"] == expected[f"eval/{name}"]
    assert sum(map(sum, found[0][-1]["eval/confusion_matrix"])) == 6


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_step_is_that_of_the_whole_batch_at_once(num_ranks: int, tmp_path: Path) -> None:
    """11 samples in micro-batches of 4, 4 and 3: a mean of means would give another loss and gradient."""
    options = ("--num-train", "11", "--max-steps", "1", "--lr", "0.5", "--max-grad-norm", "0")
    argv = [*BASE, *options, "--optimizer", "sgd", "--momentum", "0.9", "--output-dir", str(tmp_path)]
    run_on_ranks(num_ranks, run_well, LinearNet, argv)
    recipe = LinearNet(NetOptions(num_train=11))
    model, _ = build_model(recipe, 0, is_resumed=False)
    data = recipe.datasets()["train"].columns
    loss = torch.nn.functional.cross_entropy(model(data["inputs"]), data["labels"])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    line = training_lines(tmp_path)[0]
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert line["grad_norm"] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), abs=1e-6)
    assert (line["samples"], line["lr"]) == (11, 0.5)
    tensors = final_tensors(tmp_path)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(tensors[name], parameter.detach() - 0.5 * gradient, atol=1e-6, rtol=0)


def _unseeded(argv: list[str]) -> tuple[int, str]:
    return run_quietly(UnseededNet, argv)


def test_ranks_with_different_data_are_refused(tmp_path: Path) -> None:
    answers = run_on_ranks(2, _unseeded, [*BASE, "--output-dir", str(tmp_path)])
    assert [status for status, _ in answers] == [2, 2]
    assert "rank 1 has other options or data than rank 0" in "".join(output for _, output in answers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_while_loading_is_one_message(num_workers: int, tmp_path: Path) -> None:
    argv = [*BASE, "--num-workers", str(num_workers), "--output-dir", str(tmp_path)]
    ((status, output),) = run_on_ranks(1, run_quietly, PickyNet, argv)
    assert (status, output.splitlines()[-1]) == (2, "error: this is not to my taste")
    assert "Traceback" not in output


def test_going_back_in_place_is_refused(tmp_path: Path) -> None:
    _run(1, tmp_path / "run", "--save-every", "4", "--keep", "0")
    older = tmp_path / "run" / "checkpoints" / "step-00000004"
    argv = [*BASE, "--resume", str(older), "--output-dir"]
    ((status, output),) = run_on_ranks(1, run_quietly, NetRecipe, [*argv, str(tmp_path / "run")])
    assert status == 2
    assert "newer checkpoints (steps 7, 8, 12)" in output
    run_on_ranks(1, run_well, NetRecipe, [*argv, str(tmp_path / "branch")])
    tensors, others = final_tensors(tmp_path / "run"), final_tensors(tmp_path / "branch")
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def test_evaluations_decide_with_early_stopping(tmp_path: Path) -> None:
    patient = ("--early-stopping-patience", "9")
    _run(1, tmp_path, *patient, "--eval-every", "3", "--stop-at-step", "5")
    argv = [*BASE, *patient, "--eval-every", "1", "--output-dir", str(tmp_path)]
    ((status, output),) = run_on_ranks(1, run_quietly, NetRecipe, argv)
    assert status == 2
    assert "--eval-every: 3 -> 1" in output


def test_gradient_checkpointing_is_the_same_run(tmp_path: Path) -> None:
    save_small_bert(tmp_path / "model")
    argv = [
        *("--preset", "demo", "--max-steps", "3", "--model", str(tmp_path / "model"), "--max-length", "16"),
        *("--tracker", "none", "--threads-per-rank", "1"),
    ]
    run_on_ranks(2, run_well, FewReviews, [*argv, "--output-dir", str(tmp_path / "plain")])
    words = [*argv, "--gradient-checkpointing", "--output-dir", str(tmp_path / "again")]
    (output, _) = run_on_ranks(2, run_well, FewReviews, words)
    assert "Warning" not in output
    words = [*argv, "--gradient-checkpointing", "--gradient-checkpointing-every", "2"]
    run_on_ranks(2, run_well, FewReviews, [*words, "--output-dir", str(tmp_path / "every-2")])
    for name in ("again", "every-2"):
        for expected, found in zip(training_lines(tmp_path / "plain"), training_lines(tmp_path / name), strict=True):
            assert found == pytest.approx(expected, abs=1e-6)


def test_an_error_of_rank_0_reaches_all_ranks() -> None:
    assert run_on_ranks(3, _main_first_with_failing_main) == ["cache: No space left on device"] * 3

"""`fit` in one process: outcomes, options, errors, and a process that is left as it was found."""

import json
import os
import random
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState

from shardlaunch import Recipe, UserError, fit
from shardlaunch.checkpoints.reader import checkpoint_steps
from tests.recipes import LinearNet, NetOptions, NetRecipe, training_lines

SHORT: dict[str, Any] = {"max_steps": 4, "eval_every": 2, "threads_per_rank": 1}


def test_a_sweep_in_a_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [fit(NetRecipe, lr=lr, output_dir=tmp_path / str(lr), **SHORT) for lr in (0.1, 0.01, 0.001)]
    assert capsys.readouterr() == ("", "")
    for result in results:
        assert (result.step, result.is_finished, len(result.evaluations)) == (4, True, 2)
        assert result.evaluations[-1].keys() == {"step", "epoch", "loss", "accuracy"}
        assert result.last_checkpoint == result.run_dir / "checkpoints" / "step-00000004"
        assert result.best_value == max(evaluation["accuracy"] for evaluation in result.evaluations)
        assert result.best_checkpoint is not None
        assert result.best_checkpoint.is_dir()
        history = result.history()
        assert list(history["step"]) == [1, 2, 3, 4]
        assert history["eval/loss"].notna().tolist() == [False, True, False, True]
    assert len({result.evaluations[-1]["loss"] for result in results}) == 3


def test_a_file_that_asks_to_stop(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    stopped = fit(NetRecipe, output_dir=tmp_path, **SHORT)
    assert (stopped.step, stopped.is_finished) == (1, False)
    assert not (tmp_path / "stop").exists()
    assert (whole := fit(NetRecipe, output_dir=tmp_path, **SHORT)).is_finished
    assert list(whole.history()["step"]) == [1, 2, 3, 4]


def test_the_process_is_left_as_it_was_found(tmp_path: Path) -> None:
    def state() -> Any:
        numpy_state = np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
        return (
            dict(os.environ),
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy_state,
            torch.is_grad_enabled(),
            dict(PartialState._shared_state),
        )

    torch.set_num_threads(2)
    before = state()
    fit(NetRecipe, output_dir=tmp_path / "run", seed=3, **SHORT)
    assert state() == before
    with pytest.raises(UserError, match="holds another run"):
        fit(NetRecipe, output_dir=tmp_path / "run", seed=4, **SHORT)
    assert state() == before
    assert not torch.distributed.is_initialized()


def test_it_is_the_run_of_the_command_line(tmp_path: Path) -> None:
    from tests.recipes import run_well

    words = ("--max-steps", "4", "--eval-every", "2", "--threads-per-rank", "1", "--lr", "0.02")
    run_well(NetRecipe, [*words, "--output-dir", str(tmp_path / "command")])
    torch.manual_seed(99)  # of no consequence
    fit(NetRecipe, lr=0.02, output_dir=tmp_path / "call", **SHORT)
    assert training_lines(tmp_path / "call") == training_lines(tmp_path / "command")


def test_a_run_is_resumed_complete_or_extended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = fit(LinearNet, output_dir=tmp_path / "whole", max_steps=4, extend_to_steps=6, threads_per_rank=1)
    assert fit(LinearNet, output_dir=folder, stop_at_step=2, max_steps=4, threads_per_rank=1).step == 2
    assert fit(LinearNet, output_dir=folder, max_steps=4, threads_per_rank=1).is_finished
    lines = training_lines(folder)
    assert fit(LinearNet, output_dir=folder, max_steps=4, threads_per_rank=1).step == 4
    assert training_lines(folder) == lines, "complete: nothing is trained"
    extended = fit(LinearNet, output_dir=folder, max_steps=4, extend_to_steps=6, threads_per_rank=1)
    assert (extended.step, extended.is_finished) == (6, True)
    assert json.loads((folder / "run.json").read_text())["extended_to_steps"] == 6
    later = [line for line in training_lines(folder) if "loss" in line and line["step"] > 4]
    assert later == [line for line in training_lines(whole.run_dir) if "loss" in line and line["step"] > 4]
    again = fit(LinearNet, output_dir=folder, max_steps=4, threads_per_rank=1)
    assert (again.step, again.is_finished) == (6, True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "linear"}, "--schedule linear ends at a learning rate of 0 after 4 steps"),
        ({"schedule": "one-cycle"}, "--schedule one-cycle ends at a learning rate of 0"),
        ({"extend_to_steps": 4}, "must be more than the run's 4 steps"),
    ],
)
def test_an_extension_without_meaning_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        fit(LinearNet, output_dir=tmp_path / "run", max_steps=4, **{"extend_to_steps": 6, **options})


def test_an_instance_keeps_its_options(tmp_path: Path) -> None:
    recipe = NetRecipe(NetOptions(lr=0.05, max_steps=4, num_train=64))
    result = fit(recipe, output_dir=str(tmp_path / "run"), lr=0.07, threads_per_rank=1)
    options = json.loads((result.run_dir / "run.json").read_text())["options"]
    assert (options["lr"]["value"], options["num_train"]["value"]) == (0.07, 64)
    assert recipe.options.lr == 0.05


def test_folds(tmp_path: Path) -> None:
    result = fit(NetRecipe, folds=2, num_train=128, output_dir=tmp_path / "run", **SHORT)
    assert [fold.step for fold in result.folds] == [4, 4]
    assert result.is_finished
    assert set(result.history()["fold"]) == {1, 2}


def test_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch"):
        fit(NetRecipe, nosuch=1)
    with pytest.raises(UserError, match="--lr"):
        fit(NetRecipe, lr=-1.0, output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="preset"):
        fit(NetRecipe, preset="nosuch")

    class Broken(NetRecipe):
        def model(self) -> torch.nn.Module:
            raise ZeroDivisionError("of the user's own")

    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        fit(Broken, output_dir=tmp_path / "broken", **SHORT)


def test_saves_as_often_as_failures_make_it_best(tmp_path: Path) -> None:
    """Where one is expected per second, and hardly ever."""
    for mtbf, is_often in (("1s", True), ("1000d", False)):
        run_dir = tmp_path / mtbf
        fit(NetRecipe, output_dir=run_dir, **{**SHORT, "save_every": "auto", "mtbf": mtbf, "keep": 0, "eval_every": 99})
        assert (len(checkpoint_steps(run_dir / "checkpoints")) > 1) == is_often


def test_a_warning_is_a_python_warning(tmp_path: Path) -> None:
    fit(NetRecipe, output_dir=tmp_path / "run", **{**SHORT, "stop_at_step": 2, "save_every": 1, "keep": 0})
    with open(tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json", "ab") as file:
        file.write(b" damaged")
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        assert fit(NetRecipe, output_dir=tmp_path / "run", **SHORT).step == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(NetRecipe, output_dir=tmp_path / "run", **SHORT).step == 4


def test_a_recipe_of_a_notebook_is_a_recipe_class_without_a_file(tmp_path: Path) -> None:
    recipe_type: type[Recipe] = type("Nameless", (NetRecipe,), {"__module__": "builtins"})
    assert fit(recipe_type, output_dir=tmp_path / "run", **SHORT).step == 4


class Waiting(NetRecipe):
    """A recipe whose data come when it is told."""

    begun, may_go_on = threading.Event(), threading.Event()

    def datasets(self) -> Any:
        self.begun.set()
        assert self.may_go_on.wait(60)
        return super().datasets()


def test_a_thread_may_call_fit_but_not_two_at_once(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(Waiting, output_dir=tmp_path / "one", **SHORT)))
    thread.start()
    assert Waiting.begun.wait(60)
    with pytest.raises(UserError, match="another run is in progress in this process"):
        fit(NetRecipe, output_dir=tmp_path / "two", **SHORT)
    Waiting.may_go_on.set()
    thread.join(60)
    assert [result.step for result in results] == [4]
    assert fit(NetRecipe, output_dir=tmp_path / "two", **SHORT).step == 4


@pytest.mark.parametrize("output_dir", ["run", "."])
def test_the_hint_of_a_refusal_starts_a_new_run(
    output_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folds: dict[str, Any] = {"folds": 2, "num_train": 128, **SHORT}
    fit(NetRecipe, output_dir=output_dir, **folds)
    with pytest.raises(UserError, match=r"--lr: .* -> 0.5") as error:
        fit(NetRecipe, output_dir=output_dir, lr=0.5, **folds)
    new = Path(str(error.value).rpartition("--output-dir ")[2])
    assert new.name == f"{Path(output_dir).resolve().name}-2"
    assert new.resolve().parent == Path(output_dir).resolve().parent
    assert fit(NetRecipe, output_dir=new, lr=0.5, **folds).is_finished


@pytest.mark.parametrize("record", ["[]", "{}", '{"identity": {}, "warn": 3}', "{"])
def test_a_damaged_record_of_a_run_is_refused(record: str, tmp_path: Path) -> None:
    fit(NetRecipe, output_dir=tmp_path, **SHORT)
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(UserError, match=r"run\.json: not a readable record of a run"):
        fit(NetRecipe, output_dir=tmp_path, **SHORT)


def test_a_run_that_stopped_early_is_not_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {**SHORT, "eval_every": 1, "early_stopping_patience": 1, "lr": 1e-12}
    assert fit(NetRecipe, output_dir=tmp_path, **options).step == 2
    assert fit(NetRecipe, output_dir=tmp_path, extend_to_steps=6, show=True, **options).step == 2
    assert "this run is complete: 2 of 4, extended to 6 steps, stopped early" in capsys.readouterr().out


def test_all_checkpoints_damaged(tmp_path: Path) -> None:
    fit(NetRecipe, output_dir=tmp_path / "run", **SHORT)
    for manifest in (tmp_path / "run").glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with (
        pytest.raises(UserError, match=r"^no valid checkpoint in .*To start from the beginning, delete them"),
        pytest.warns(UserWarning, match="skipped a damaged checkpoint"),
    ):
        fit(NetRecipe, output_dir=tmp_path / "run", **SHORT)
    for option in ("init_from", "resume"):
        paths: dict[str, Any] = {option: tmp_path / "run", "output_dir": tmp_path / "other"}
        with (
            pytest.raises(UserError, match=rf"^--{option.replace('_', '-')} {tmp_path}/run: no valid .*\)$"),
            pytest.warns(UserWarning, match="skipped a damaged checkpoint"),
        ):
            fit(NetRecipe, **paths, **SHORT)

"""`shardlaunch evaluate`: the figures of a run's log, other data, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from shardlaunch import UserError
from shardlaunch.launcher.commands.evaluate import evaluate_run
from shardlaunch.launcher.reporting.tracking import EVALUATIONS
from shardlaunch.recipes.bert_imdb import BertImdb
from tests.recipes import RankedNet, run_well, save_small_bert, training_lines

OWN_RECIPE = """
import csv

import torch
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch


class Mine(Recipe):
    options: Options

    def datasets(self):
        with open(self.options.data) as file:
            rows = [[float(cell) for cell in row] for row in csv.reader(file)]
        inputs = torch.tensor(rows)
        data = TensorData(inputs=inputs[:, :1], labels=inputs[:, 1])
        return {"train": data, "eval": data}

    def model(self):
        return nn.Linear(1, 1)

    def loss(self, outputs, batch):
        return (outputs[:, 0] - batch["labels"]).square().sum()


launch(Mine)
"""


def evaluated(run: Path, capsys: pytest.CaptureFixture[str] | None = None, **options: Any) -> dict[str, Any]:
    """Evaluate a run and return what was written."""
    defaults: dict[str, Any] = {"data": (), "split": "", "step": None, "ema": False, "output": None, "recipe": ""}
    before = set((run / EVALUATIONS).glob("*")) if options.get("output") is None else set()
    assert evaluate_run(run, **{**defaults, **options}, as_json=False) == 0
    written = options.get("output") or max((run / EVALUATIONS).glob("*"), key=lambda path: path.stat().st_mtime_ns)
    assert before <= set((run / EVALUATIONS).glob("*"))
    record: dict[str, Any] = json.loads(written.read_text())
    return record


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net") / "run"
    argv = ["--max-steps", "6", "--eval-every", "3", "--save-every", "3", "--ema", "0.5", "--output-dir", str(folder)]
    run_well(RankedNet, [*argv, "--keep", "0"])
    return folder


def test_the_figures_are_those_of_the_log(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = {line["step"]: line for line in training_lines(net) if "eval/loss" in line}
    for step, chosen in ((3, 3), (6, None)):
        for prefix in ("eval/", "eval_ema/"):
            record = evaluated(net, step=chosen, ema=prefix == "eval_ema/")
            assert {f"{prefix}{name}": value for name, value in record["metrics"].items()} == {
                name: value for name, value in logged[step].items() if name.startswith(prefix)
            }
    assert len(list((net / EVALUATIONS).iterdir())) == 4
    record = evaluated(net, split="train")
    assert record["num_samples"] == 203
    assert record["confusions"] == ["confusion_matrix"]
    assert f"{record['metrics']['auroc']:.6g}" in capsys.readouterr().out
    in_folder = evaluated(net, output=net.parent / "new" / "mine.json")
    assert in_folder["step"] == 6
    shutil.rmtree(net / EVALUATIONS)


def test_refusals(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(run: Path, match: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            evaluated(run, **options)

    refused(tmp_path, "neither a run")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "empty", "no checkpoint in this folder")
    (tmp_path / "folds" / "fold-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "folds" / "fold-2" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "folds", "is a cross-validation; choose a fold, such as .*fold-1")
    refused(net, "no checkpoint of step 4; it has 3, 6", step=4)
    refused(net, "--split test: the run's data have train, eval", split="test")
    refused(net, "the recipe does not read --data", data=("somewhere",))
    (tmp_path / "notes.json").write_text("{}")
    refused(net, "exists and is no evaluation", output=tmp_path / "notes.json")
    moved = tmp_path / "moved"
    shutil.copytree(net, moved)
    _change_recipe_file(moved, xxh3_128="0" * 32)
    evaluated(moved)
    assert "is not as it was when the run began" in capsys.readouterr().err
    _change_recipe_file(moved, path="/gone/recipes.py")
    refused(moved, "recipe recipes, whose file /gone/recipes.py is gone; say where it is with --recipe FILE")
    other = tmp_path / "other.py"
    other.write_text(OWN_RECIPE)
    refused(moved, "has no class RankedNet", recipe=str(other))
    other.write_text(OWN_RECIPE.replace("Mine", "RankedNet"))
    refused(moved, "was trained with .*--num-train.*, which the recipe does not have", recipe=str(other))
    other.write_text("1 / 0")
    refused(moved, "fails when it is imported: ZeroDivisionError", recipe=str(other))
    for file in (moved / "checkpoints").glob("*/model*.safetensors"):
        file.write_bytes(b"")
    refused(moved, "no valid checkpoint")


def _change_recipe_file(run: Path, **changed: str) -> None:
    record = json.loads((run / "run.json").read_text())
    record["recipe_file"].update(changed)
    (run / "run.json").write_text(json.dumps(record))


def test_a_recipe_that_reads_its_data_itself(tmp_path: Path) -> None:
    recipe, run = tmp_path / "mine.py", tmp_path / "run"
    recipe.write_text(OWN_RECIPE)
    for name, rows in (("here", ["1,2", "2,3"] * 8), ("there", ["5,5", "6,6", "7,7"])):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    from shardlaunch.launcher.commands.doctor.recipe import load_recipe

    recipe_type, _ = load_recipe(recipe)
    assert recipe_type is not None
    argv = ["--data", str(tmp_path / "here.csv"), "--max-steps", "2", "--tracker", "none", "--output-dir", str(run)]
    run_well(recipe_type, [*argv, "--global-batch-size", "8"])
    assert evaluated(run)["num_samples"] == 16
    record = evaluated(run, data=(str(tmp_path / "there.csv"),))
    assert record["num_samples"] == 3
    with pytest.raises(UserError, match=r"the data cannot be read: .*gone\.csv"):
        evaluated(run, data=(str(tmp_path / "gone.csv"),))
    recipe.write_text(OWN_RECIPE.replace("nn.Linear(1, 1)", "nn.Linear(1, 2)"))
    with pytest.raises(UserError, match=r"another model than .*weight is \[1, 1\] there, \[2, 1\] here"):
        evaluated(run)


def test_other_texts_are_evaluated_with_the_classes_of_the_run(tmp_path: Path) -> None:
    save_small_bert(tmp_path / "bert")
    kinds = ["good", "bad", "fair"] * 12
    rows = pd.DataFrame({"text": [f"film {n} is {kind}" for n, kind in enumerate(kinds)], "label": kinds})
    rows.to_csv(tmp_path / "own.csv", index=False)
    run = tmp_path / "run"
    argv = ["--model", str(tmp_path / "bert"), "--data", str(tmp_path / "own.csv"), "--output-dir", str(run)]
    metrics = ["--metrics", "accuracy", "confusion_matrix", "--class-weights", "balanced"]
    run_well(BertImdb, [*argv, *metrics, "--max-steps", "2", "--global-batch-size", "8", "--tracker", "none"])
    (logged,) = [line for line in training_lines(run) if "eval/loss" in line]
    assert {f"eval/{name}": value for name, value in evaluated(run)["metrics"].items()} == {
        name: value for name, value in logged.items() if name.startswith("eval/")
    }

    # Only one of the classes, the last of the run's by name: it keeps its number.
    rows[rows.label == "good"].to_parquet(tmp_path / "good.parquet")
    record = evaluated(run, data=(str(tmp_path / "good.parquet"),))
    assert (record["num_samples"], record["class_names"]) == (12, ["bad", "fair", "good"])
    assert [sum(row) for row in record["metrics"]["confusion_matrix"]] == [0, 0, 12]
    all_rows = evaluated(run, data=(str(tmp_path / "own.csv"),))
    assert [sum(row) for row in all_rows["metrics"]["confusion_matrix"]] == [12, 12, 12]

    def refused(frame: pd.DataFrame, match: str) -> None:
        frame.to_csv(tmp_path / "other.csv", index=False)
        with pytest.raises(UserError, match=match):
            evaluated(run, data=(str(tmp_path / "other.csv"),))

    refused(rows.replace("fair", "meh"), "unknown classes in column 'label': 'meh'; those of the run are")
    refused(rows.drop(columns="label"), "no column 'label', which the evaluation needs; it has 'text'")
    refused(rows[:0], "no rows")
    rows[:-1].to_csv(tmp_path / "own.csv", index=False)
    with pytest.raises(UserError, match="the training data are not those of the run any more"):
        evaluated(run, data=(str(tmp_path / "good.parquet"),))

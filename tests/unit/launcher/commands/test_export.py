"""`shardlaunch export`: models that others load, with the same outputs, and those that a format cannot hold."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from shardlaunch import UserError
from shardlaunch.launcher.commands.export import main as export
from shardlaunch.launcher.commands.export import reload
from shardlaunch.launcher.commands.export.formats import FORMATS
from shardlaunch.launcher.commands.trained import open_run
from shardlaunch.recipes.bert_imdb import BertImdb
from tests.recipes import NUM_FEATURES, LinearNet, NetRecipe, run_well, save_small_bert


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs: of a net with a branch on values, of one without, of a small BERT with adapters."""
    folder = tmp_path_factory.mktemp("runs")
    steps = ["--max-steps", "2", "--tracker", "none"]
    for recipe_type, name in ((NetRecipe, "branching"), (LinearNet, "linear")):
        run_well(recipe_type, [*steps, "--output-dir", str(folder / name), "--ema", "0.5"])
    save_small_bert(folder / "model")
    rows = pd.DataFrame({"text": [f"film {n}" + " so" * (n % 5) for n in range(40)], "label": ["bad", "good"] * 20})
    rows.to_csv(folder / "films.csv", index=False)
    bert = ["--model", str(folder / "model"), "--data", str(folder / "films.csv"), "--max-length", "16"]
    sizes = ["--global-batch-size", "8", "--micro-batch-size", "4"]
    run_well(BertImdb, [*steps, *bert, *sizes, "--lora-rank", "2", "--output-dir", str(folder / "lora")])
    return folder


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load exported models in this process, where no more than the formats is tested."""

    def call(words: Sequence[str]) -> str:
        try:
            reload.main(*words)
        except Exception as error:
            return str(error).splitlines()[-1]
        return ""

    monkeypatch.setattr(export, "in_fresh_process", call)


def exported(run: Path, out: Path, kind: str, **options: Any) -> Path:
    defaults: dict[str, Any] = {"step": None, "ema": False, "recipe": ""}
    assert export.export_run(run, out, kind=kind, **{**defaults, **options}) == 0
    return out


def test_a_program_in_a_fresh_process(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = exported(runs / "linear", tmp_path / "out", "torch-export", ema=True)
    (difference,) = re.findall(r"largest difference (\S+) in a fresh process", capsys.readouterr().out)
    assert float(difference) < 1e-6
    about = json.loads((out / "export.json").read_text())
    assert about["inputs"] == [{"name": "input", "dtype": "float32", "shape": [None, NUM_FEATURES]}]
    assert (about["outputs"], about["weights"]) == (["output"], "average")
    (step_dir,) = (runs / "linear" / "checkpoints").iterdir()
    averages = {
        name.partition("/")[2] or name: value for name, value in load_file(next(step_dir.glob("ema-*"))).items()
    }
    inputs = torch.randn(7, NUM_FEATURES)
    (found,) = FORMATS["torch-export"].load(out / "model.pt2")({"input": inputs})
    weight = next(value for value in averages.values() if value.dim() == 2)
    bias = next(value for value in averages.values() if value.dim() == 1)
    torch.testing.assert_close(found, inputs @ weight.T + bias)


@pytest.mark.usefixtures("_in_this_process")
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_other_formats_take_any_number_of_samples(kind: str, runs: Path, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
        pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    out = exported(runs / "linear", tmp_path / "out", kind)
    call = FORMATS[kind].load(out / FORMATS[kind].file)
    assert [call({"input": torch.zeros(count, NUM_FEATURES)})[0].shape[0] for count in (1, 9)] == [1, 9]


@pytest.mark.usefixtures("_in_this_process")
def test_a_branch_on_values_is_refused_with_the_reason(runs: Path, tmp_path: Path) -> None:
    for kind, reason in (("torch-export", "data-dependent"), ("torchscript", "Python boolean")):
        with pytest.raises(UserError, match=f"--format {kind}: this model cannot be exported: .*{reason}"):
            exported(runs / "branching", tmp_path / "out", kind)
        assert not list(tmp_path.iterdir())
    out = exported(runs / "branching", tmp_path / "out", "safetensors")
    assert "first.weight" in load_file(out / "model.safetensors")


@pytest.mark.usefixtures("_in_this_process")
def test_a_transformers_model_with_adapters_is_a_plain_one(runs: Path, tmp_path: Path) -> None:
    out = exported(runs / "lora", tmp_path / "out", "hf")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert not (out / "adapter_config.json").exists()

    run = open_run(runs / "lora", step=None, recipe_path="", warn=pytest.fail, on_cpu=True)
    data, batch = run.load_data(), {"input_ids": torch.tensor([[101, 2143, 102]])}
    model = run.model()
    calls = export._calls(run, data, model)
    assert export._dynamic_axes(calls) == {name: [0, 1] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        before = model(**batch).logits
        export._merge_adapters(model)
        torch.testing.assert_close(model(**batch).logits, before)
        layer = next(module for name, module in model.named_modules() if name.endswith("query"))
        assert layer.merged


@pytest.mark.usefixtures("_in_this_process")
def test_refusals(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, run: Path = runs / "linear", out: Path = tmp_path / "out", kind: str = "hf") -> None:
        with pytest.raises(UserError, match=match):
            exported(run, out, kind)
        assert not (tmp_path / "out").exists()

    refused("--format gguf: must be one of hf, safetensors, torch-export, onnx, torchscript", kind="gguf")
    refused("has no config.json, because the recipe's model is none of transformers")
    refused("the run trains adapters; use --format hf", run=runs / "lora", kind="safetensors")
    refused("neither a run", run=tmp_path)
    refused("exists and is no empty folder", out=runs)
    monkeypatch.setattr(export, "MOST_DIFFERENCE", -1.0)
    refused("computes something else: its outputs differ by", kind="safetensors")
    monkeypatch.setattr(export, "in_fresh_process", lambda words: "RuntimeError: what")
    refused("cannot be used: RuntimeError: what", kind="safetensors")

"""`shardlaunch export`: models that others load, with the same outputs, and those that a format cannot hold."""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shardlaunch import UserError
from shardlaunch.launcher.commands.export import main as export
from shardlaunch.launcher.commands.export import quantized, reload
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


def _bytes_of_weights(folder: Path) -> int:
    """Return the size of a model without the code that a program holds too."""
    programs = list(folder.glob("*.pt2"))
    if not programs:
        return (folder / "model.safetensors").stat().st_size
    with zipfile.ZipFile(programs[0]) as members:
        return sum(one.file_size for one in members.infolist() if "/weights/" in one.filename)


@pytest.mark.usefixtures("_in_this_process")
@pytest.mark.parametrize("kind", ["hf", "torch-export"])
def test_weights_in_8_bits(kind: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all linear layers that are called, here of an encoder with merged adapters; what that changes is printed."""
    pytest.importorskip("torchao", reason="the extra `quantize` is not installed")
    exported(runs / "lora", tmp_path / "plain", kind)
    capsys.readouterr()
    out = exported(runs / "lora", tmp_path / "out", kind, quantize="int8")
    said = capsys.readouterr().out
    # 2 blocks of 6, the pooler, and the classifier
    (change,) = re.findall(r"  14 linear layers with int8 weights: outputs differ by up to (\S+) from", said)
    assert 1e-6 < float(change) < 1e-2
    for name in ("loss", "accuracy"):
        before, after = re.findall(rf"eval/{name}: (\S+) in fp32, (\S+) in int8", said)[0]
        assert float(after) == pytest.approx(float(before), abs=0.05)

    sizes = [_bytes_of_weights(folder) for folder in (tmp_path / "plain", out)]
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64 + 2 * 64
    assert sizes[0] - sizes[1] > 2 * weights, "three bytes less per weight, but for scales and headers"
    if kind == "hf":
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
        assert {path.name for path in (tmp_path / "plain").iterdir()} <= {path.name for path in out.iterdir()}
    else:
        assert json.loads((out / "export.json").read_text())["quantize"] == "int8"


@pytest.mark.usefixtures("_in_this_process")
def test_weights_that_cannot_be_quantized(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, run: Path = runs / "linear", kind: str = "torch-export", quantize: str = "int8") -> None:
        with pytest.raises(UserError, match=match):
            exported(run, tmp_path / "out", kind, quantize=quantize)
        assert not list(tmp_path.iterdir())

    refused("--quantize int4: torchao has weights of 4 bits on GPUs only", quantize="int4")
    refused("--quantize int5: must be int8", quantize="int5")
    refused("--format onnx does not hold such weights; use hf or torch-export", kind="onnx")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    refused("torchao is not installed: pip install")


def test_only_layers_that_are_called_and_share_no_weights_are_quantized() -> None:
    pytest.importorskip("torchao", reason="the extra `quantize` is not installed")

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.first = nn.Embedding(8, 16), nn.Linear(16, 16)
            self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 8, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(self.embedding(ids)))  # type: ignore[no-any-return]

    model = Tied()
    quantized.quantize_called_layers(model, lambda: model(torch.arange(4)))
    assert type(model.first.weight).__name__ == "Int8Tensor"
    assert quantized.num_quantized(model) == 1
    bare = nn.Sequential(nn.Conv1d(1, 1, 1))
    with pytest.raises(UserError, match=r"calls no torch\.nn\.Linear with weights of its own"):
        quantized.quantize_called_layers(bare, lambda: bare(torch.ones(1, 1, 1)))

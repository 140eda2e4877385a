"""`--init-from`: which stored weights a new run loads, under which names, and how the others are reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardlaunch import UserError, fit
from shardlaunch.launcher.runs.init_from import match_weights
from tests.recipes import LinearNet, Net, NetRecipe, final_tensors

SHORT: dict[str, Any] = {"max_steps": 1, "threads_per_rank": 1, "lr": 1e-30}


class Wider(NetRecipe):
    """The net with one more class, so that its last layer has another shape."""

    best_metric = "loss"

    def metrics(self) -> dict[str, Any]:
        return {}

    def model(self) -> nn.Module:
        net = Net()
        net.last = nn.Linear(16, 4)
        return net


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    fit(NetRecipe, output_dir=folder / "run", max_steps=3, threads_per_rank=1, seed=5)
    return folder / "run"


def test_a_run_starts_from_another_runs_weights(source: Path, tmp_path: Path) -> None:
    checkpoint = source / "checkpoints" / "step-00000003"
    expected = final_tensors(source)
    for number, path in enumerate((source, checkpoint, *checkpoint.glob("model-*.safetensors"))):
        result = fit(NetRecipe, init_from=path, output_dir=tmp_path / str(number), **SHORT)
        found = final_tensors(result.run_dir)
        for name, _ in Net().named_parameters():
            assert torch.allclose(found[name], expected[name], atol=1e-12), name
        identity = json.loads((result.run_dir / "run.json").read_text())["identity"]
        assert identity["digest of the weights of --init-from"]


def test_what_does_not_fit_is_said_and_new(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = fit(Wider, init_from=source, output_dir=tmp_path / "run", show=True, **SHORT)
    out = " ".join(capsys.readouterr().out.split())
    assert "last.weight (stored [3, 16], here [4, 16])" in out
    assert "2 of 10 tensors newly initialized" in out
    assert "newly initialized: last.weight, last.bias" in out
    expected, found = final_tensors(source), final_tensors(result.run_dir)
    assert torch.allclose(found["first.weight"], expected["first.weight"], atol=1e-12)
    assert found["last.weight"].shape == (4, 16)


def test_the_weights_are_part_of_the_run(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(NetRecipe, init_from=source, output_dir=folder, max_steps=2, stop_at_step=1, threads_per_rank=1)
    other = tmp_path / "other.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in Net().named_parameters()}, other)
    with pytest.raises(UserError, match="digest of the weights of --init-from"):
        fit(NetRecipe, init_from=other, output_dir=folder, max_steps=2, threads_per_rank=1)
    assert fit(NetRecipe, output_dir=folder, max_steps=2, threads_per_rank=1).step == 2, "a resume need not name them"


@pytest.mark.parametrize(
    ("prefix", "renaming"),
    [
        ("", ""),
        ("module.", "without 'module.'"),
        ("_orig_mod.", "without '_orig_mod.'"),
        ("model.", "without 'model.'"),
    ],
)
def test_names_of_wrappers(prefix: str, renaming: str) -> None:
    shapes = {f"{prefix}{name}": tuple(value.shape) for name, value in Net().state_dict().items()}
    match = match_weights(shapes, Net())
    assert (match.absent, match.unused, match.other_shapes, match.renaming) == ([], [], {}, renaming)


def test_a_base_model_with_and_without_its_prefix() -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    base, whole = BertModel(config), BertForSequenceClassification(config)
    shapes = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    match = match_weights(shapes, whole)
    assert (match.absent, match.unused) == (["classifier.weight", "classifier.bias"], [])
    assert match.renaming == "with 'bert.' before them"
    shapes = {name: tuple(value.shape) for name, value in whole.state_dict().items()}
    match = match_weights(shapes, base)
    assert (match.absent, match.unused) == ([], ["classifier.weight", "classifier.bias"])


def test_tied_tensors_are_there_under_any_of_their_names() -> None:
    shapes = {name: tuple(value.shape) for name, value in Net().state_dict().items() if name != "middle.weight"}
    match = match_weights(shapes, Net())
    assert match.absent == []
    assert match.stored_names["tied.weight"] == "tied.weight"


def test_paths_without_usable_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "index").mkdir()
    (tmp_path / "folds" / "fold-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../other.safetensors"}}')
    for name, says in {
        "nosuch": "no such file or folder",
        "folds": "it is a cross-validation: choose a fold, such as .*/folds/fold-1",
        "empty": "no model\\*.safetensors file",
        "pickled": "pytorch_model.bin is a pickle, which is never loaded",
        "broken.safetensors": "not a readable safetensors file",
        "other.safetensors": "no tensor matches the model by name and shape",
        "index": "is not a plain file name",
    }.items():
        with pytest.raises(UserError, match=f"--init-from .*{says}"):
            fit(LinearNet, init_from=tmp_path / name, output_dir=tmp_path / "run", **SHORT)

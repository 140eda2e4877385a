"""`shardlaunch ckpt` knows the average of the weights that a run keeps."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.weight_files import open_weights
from tests.unit.checkpoints.saved import flip, save_step, tensors
from tests.unit.launcher.commands.ckpt.conftest import Ckpt

AVERAGES = {name: tensors(seed=9)[name] for name in ("layer.weight", "norm.running_mean")}
"""The average of a weight and a buffer; the other weights were frozen."""


@pytest.fixture
def step_dir(tmp_path: Path) -> Path:
    files = {"README.md": "# A run\n", "config.json": "{}"}
    return save_step(tmp_path / "run" / "checkpoints", 4, averages=AVERAGES, files=files)


def test_it_is_exported_in_place_of_the_weights(step_dir: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    for words, expected in (((), tensors(seed=4)), (("--ema",), {**tensors(seed=4), **AVERAGES})):
        out = tmp_path / f"out{len(words)}"
        ended = ckpt("export", step_dir, out, *words)
        assert (ended.status, ended.err) == (0, "")
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert ("are the average that the run has kept" in (out / "README.md").read_text()) is bool(words)
        weights = open_weights(out, warn=print)  # as --init-from does
        assert torch.equal(weights.read("layer.weight"), expected["layer.weight"])
    assert torch.equal(open_weights(step_dir, warn=print).read("layer.weight"), tensors(seed=4)["layer.weight"])


def test_a_checkpoint_without_one_is_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    ended = ckpt("export", save_step(tmp_path / "run" / "checkpoints", 4), tmp_path / "out", "--ema")
    assert ended.status == 2
    assert "holds no average of the weights: its run keeps none" in ended.err
    assert not (tmp_path / "out").exists()


def test_it_is_shown_compared_and_verified(step_dir: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    shown = ckpt("show", step_dir, "--json").document
    assert shown["sections"]["ema"] == {"tensors": 2, "elements": 40, "bytes": 160}
    assert "ema: 2 tensors, 40 elements" in ckpt("show", step_dir).out
    without = save_step(tmp_path / "without" / "checkpoints", 4)
    assert "ema" not in ckpt("show", without, "--json").document["sections"]
    changed = {**AVERAGES, "layer.weight": AVERAGES["layer.weight"] + 1}
    other = save_step(tmp_path / "other" / "checkpoints", 4, averages=changed)
    ended = ckpt("diff", step_dir, other)
    assert ended.status == 1
    assert "ema: 1 tensors differ" in ended.out
    assert "2 tensors only in A: ema/layer.weight, ema/norm.running_mean" in ckpt("diff", step_dir, without).out
    assert ckpt("diff", step_dir, other, "--weights-only").status == 0
    assert ckpt("verify", step_dir).status == 0
    (file,) = (path for path in step_dir.iterdir() if path.name.startswith("ema-"))
    flip(file)
    ended = ckpt("verify", step_dir)
    assert (ended.status, file.name in ended.out) == (1, True)
    assert ckpt("export", step_dir, tmp_path / "fine").status == 0  # the weights are whole
    assert ckpt("export", step_dir, tmp_path / "damaged", "--ema").status == 1


def test_an_index_of_another_average_is_damage(step_dir: Path, ckpt: Ckpt) -> None:
    index = step_dir / "ema.safetensors.index.json"
    document = json.loads(index.read_text())
    assert document["weight_map"].keys() == {f"ema/{name}" for name in AVERAGES}
    open_checkpoint(step_dir, peers=Peers())
    document["weight_map"].popitem()
    os.chmod(index, 0o644)
    index.write_text(json.dumps(document))
    assert ckpt("verify", step_dir).status == 1

"""`shardlaunch parity` on a recipe that keeps the promise and on one that breaks it."""

from pathlib import Path

import pytest

from tests.launch.command import SHARDLAUNCH, environment, forked_end_of

RECIPE = """
import os

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch


class Tiny(Recipe):
    options: Options

    def datasets(self):
        points = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=points, labels=(points.sum(dim=1) > 2).long())}

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"], reduction="sum") * FACTOR


launch(Tiny)
"""


@pytest.mark.parametrize(
    ("factor", "status", "said"),
    [
        ("1.0", 0, "the same run under every strategy"),
        ("float(os.environ['WORLD_SIZE'])", 1, "different or failed: fsdp2"),
    ],
    ids=["kept", "broken"],
)
def test_parity(factor: str, status: int, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE.replace("FACTOR", factor))
    words = (*SHARDLAUNCH, "parity", str(recipe), "--steps", "2", "--strategies", "fsdp2", "--", "--lr", "0.01")
    ended = forked_end_of(words, environment(tmp_path))
    assert ended.status == status, ended.both
    assert said in ended.out
    assert "2 steps in" in ended.out
    assert "fsdp2" in ended.out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--ranks", "1"), "at least 2 ranks"),
        (("--strategies", "nope"), "unknown strategy 'nope'"),
        (("--strategies", "hsdp"), "at least 4 ranks"),
        ((), "no such recipe file"),
    ],
    ids=str,
)
def test_what_cannot_be_compared(options: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    if options:
        (tmp_path / "tiny.py").write_text(RECIPE)
    ended = forked_end_of((*SHARDLAUNCH, "parity", str(tmp_path / "tiny.py"), *options), environment(tmp_path))
    assert ended.status != 0
    assert complaint in ended.both
    assert "Traceback" not in ended.both

"""`shardlaunch parity --exact` and `--find`, on a recipe that computes the same each time and on one that does not."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from shardlaunch.launcher.commands import parity_runs
from shardlaunch.launcher.commands.main import main
from tests.launch.command import environment, forked_end_of

RECIPE = """
import os

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch


class Noisy(nn.Module):
    def forward(self, values):
        return values + NOISE


class Tiny(Recipe):
    options: Options

    def datasets(self):
        points = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=points, labels=(points.sum(dim=1) > 2).long())}

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Dropout(0.1), Noisy(), nn.Linear(8, 2))

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")


launch(Tiny)
"""


Parity = Callable[..., tuple[int, str]]


@pytest.fixture
def parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Parity:
    """Return a function that runs `shardlaunch parity` here, with its runs in forked processes: (status, output)."""

    def forked(words: Sequence[str], its_environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        command, recipe, _, ranks, _, strategy, _, *argv = words
        assert command == "run"
        wanted = {name: value for name, value in its_environment.items() if name.startswith("SHARDLAUNCH_")}
        env = environment(tmp_path, {**wanted, "SHARDLAUNCH_STRATEGY": strategy})
        ended = forked_end_of((sys.executable, recipe, *argv), env, num_ranks=int(ranks))
        return subprocess.CompletedProcess(words, ended.status, ended.out, ended.err)

    def run(noise: str, *words: str) -> tuple[int, str]:
        (tmp_path / "tiny.py").write_text(RECIPE.replace("NOISE", noise))
        monkeypatch.setattr(sys, "argv", ["shardlaunch", "parity", str(tmp_path / "tiny.py"), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    monkeypatch.setattr(parity_runs, "run_command", forked)
    return run


def test_digests_of_several_numbers_of_ranks(parity: Parity) -> None:
    words = ("--exact", "--ranks", "2,3", "--strategies", "fsdp2", "--steps", "2", "--", "--global-batch-size", "24")
    status, output = parity("1e-6 * (os.environ.get('WORLD_SIZE') == '3')", *words)
    assert status == 1, output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    (_, _, expected, _), two, three = cells
    assert two == ["fsdp2", "2", expected, "the same bits"]
    assert three[:2] == ["fsdp2", "3"]
    assert three[2] != expected
    assert len(expected) == len(three[2]) == 16
    assert three[3] == "differs in step 1"
    assert output.count("differs first in ") == 1
    assert "differs first in step 1, micro-batch 1, forward: the output of 3, made by 3 (Noisy)" in output
    assert "different or failed: fsdp2, 3 ranks" in output


@pytest.mark.parametrize("noise", ["0.0", "1e-6 * os.getpid()"])
def test_two_runs_are_compared(noise: str, parity: Parity) -> None:
    status, output = parity(noise, "--find", "--steps", "2")
    if noise == "0.0":
        assert status == 0, output
        assert "two runs agree: " in output
    else:
        assert status == 1, output
        assert "differs first in step 1, micro-batch 1, forward: the output of 3, made by 3 (Noisy)" in output


def test_a_strategy_runs_on_those_ranks_that_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    found = parity_runs.topologies(("ddp", "hsdp"), (2, 4), parity_runs.new_console(), must_be_exact=True)
    assert list(map(str, found)) == ["ddp, 2 ranks", "ddp, 4 ranks", "hsdp, 4 ranks"]
    assert capsys.readouterr().out == "hsdp, 2 ranks: skipped: it needs at least 4 ranks\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--exact", "--find"), "--exact: not with --find; remove one of the two"),
        (("--exact", "--tolerance", "0.1"), "--exact: not with --tolerance"),
        (("--exact", "--ranks", "1"), "must be at least 2 ranks and 1 step"),
        (("--exact", "--ranks", "2,x"), "--ranks 2,x: must be a number, or several separated by commas"),
        (("--exact", "--strategies", "zero2"), "--strategies zero2: it sums by itself"),
        (("--exact", "--", "--no-exact"), "--exact: contradicts --no-exact"),
        (("--exact", "--", "--folds", "3"), "--folds: parity compares single runs"),
        (("--exact", "--ranks", "2,3", "--strategies", "hsdp"), "--strategies hsdp: it needs at least 4 ranks"),
        (("--find", "--ranks", "2,3"), "--find: both runs are the same"),
        (("--find", "--ranks", "0"), "must be at least 1 rank and 1 step"),
        (("--find", "--strategies", "hsdp"), "--strategies hsdp: it needs at least 4 ranks"),
        (("--find", "--strategies", "single", "--ranks", "2"), "--strategies single: it runs in one process"),
        (("--find", "--", "--compile"), "--find: not with --compile"),
        (("--find", "--steps", "2", "--", "--lr", "x"), "the first run failed (single, 1 rank)"),
    ],
    ids=str,
)
def test_what_cannot_be_compared(words: tuple[str, ...], complaint: str, parity: Parity) -> None:
    status, output = parity("0.0", *words)
    assert (status, output.count("error: ")) == (2, 1), output
    assert complaint in output
    assert "Traceback" not in output

"""LoRA by options: it starts as the base model, is the same run on any ranks, and its checkpoints hold no base model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_on_ranks
from tests.lora_recipe import Tokens, save_base
from tests.recipes import losses, run_well

pytest.importorskip("peft")
RANK = ("--lora-rank", "2")
LAST = "checkpoints/step-00000004"


def _run(argvs: list[list[str]]) -> list[str]:
    return [run_well(Tokens, argv) for argv in argvs]


def _argv(folder: Path, name: str, *words: str) -> list[str]:
    return ["--model", str(folder / "base"), "--output-dir", str(folder / name), *RANK, *words]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model and runs on one rank: `lora`, `full`, and others in the course of the tests."""
    folder = tmp_path_factory.mktemp("lora")
    save_base(folder / "base")
    full = ["--model", str(folder / "base"), "--output-dir", str(folder / "full")]
    run_on_ranks(1, _run, [_argv(folder, "lora"), full, _argv(folder, "dora", "--dora"), _argv(folder, "exact", "--exact")])
    return folder


def test_adapters_are_the_same_run_on_any_ranks(runs: Path) -> None:
    expected = losses(runs / "lora")
    several: dict[int, list[str]] = {2: ["ddp", "fsdp2", "zero1", "zero2", "zero3"], 3: ["ddp", "fsdp2"]}
    for num_ranks, names in several.items():
        argvs = [_argv(runs, f"{name}-{num_ranks}", "--strategy", name) for name in names]
        argvs += [_argv(runs, f"dora-{name}-{num_ranks}", "--strategy", name, "--dora") for name in names if num_ranks == 2]
        argvs += [_argv(runs, f"exact-{name}-{num_ranks}", "--strategy", name, "--exact") for name in ("ddp", "fsdp2")]
        run_on_ranks(num_ranks, _run, argvs)
        for name in names:
            assert losses(runs / f"{name}-{num_ranks}") == pytest.approx(expected, abs=1e-6), name
            if num_ranks == 2:
                assert losses(runs / f"dora-{name}-2") == pytest.approx(losses(runs / "dora"), abs=1e-6), name
        for name in ("ddp", "fsdp2"):
            assert losses(runs / f"exact-{name}-{num_ranks}") == losses(runs / "exact")
    assert losses(runs / "full")[1] == expected[1]

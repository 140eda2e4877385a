"""Runs of recipes that define no collate, forward or num_targets, on data as other loops have it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from shardlaunch import Recipe
from tests.distributed.ranks import run_on_ranks
from tests.recipes import LinearNet, MaskedBert, losses, run_quietly, run_well

ARGV = ["--max-steps", "6", "--lr", "0.003", "--threads-per-rank", "1", "--tracker", "none"]
MASKED = [*ARGV, "--global-batch-size", "12", "--micro-batch-size", "2"]


class Pairs(LinearNet):
    """The linear net on rows of (inputs, labels)."""

    def datasets(self) -> Any:
        splits = super().datasets()
        return {name: TensorDataset(*split.columns.values()) for name, split in splits.items()}

    def lengths(self, dataset: Any) -> None:
        return None

    collate = Recipe.collate


class Columns(LinearNet):
    """The same on columns with the same names."""

    def lengths(self, dataset: Any) -> None:
        return None


class Triples(Pairs):
    """Rows of three values."""

    def datasets(self) -> Any:
        return {"train": TensorDataset(torch.ones(9, 2), torch.ones(9), torch.ones(9))}


class NamedColumns(MaskedBert):
    """The masked BERT on the columns of a tokenizer, with the default forward and count of targets."""

    forward = Recipe.forward
    num_targets = Recipe.num_targets

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        batch = super().collate(samples, seeds)
        return {"input_ids": batch["inputs"], "labels": batch["labels"]}

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return super().loss(outputs.logits, batch)


def _run_all(runs: list[tuple[type[Recipe], list[str]]]) -> None:
    """Run them one after the other in this process. All ranks."""
    for recipe_type, argv in runs:
        run_well(recipe_type, argv)


def test_pairs_train_as_columns_do(tmp_path: Path) -> None:
    """Also where loading processes make the batches, and with a metric."""
    runs = [
        (Columns, [*ARGV, "--output-dir", str(tmp_path / "columns")]),
        (Pairs, [*ARGV, "--output-dir", str(tmp_path / "pairs")]),
        (Pairs, [*ARGV, "--output-dir", str(tmp_path / "workers"), "--num-workers", "1"]),
    ]
    run_on_ranks(1, _run_all, runs)
    assert losses(tmp_path / "columns") == losses(tmp_path / "pairs") == losses(tmp_path / "workers")
    run_on_ranks(2, run_well, Pairs, [*ARGV, "--output-dir", str(tmp_path / "two")])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "pairs"), abs=1e-6)


def test_columns_of_a_tokenizer(tmp_path: Path) -> None:
    """The model's arguments are still known where a strategy has wrapped it."""
    runs: list[tuple[type[Recipe], list[str]]] = [(MaskedBert, [*MASKED, "--output-dir", str(tmp_path / "own")])]
    for name in ("single", "fsdp2", "zero3"):
        runs.append((NamedColumns, [*MASKED, "--output-dir", str(tmp_path / name), "--strategy", name]))
    run_on_ranks(1, _run_all, runs)
    assert losses(tmp_path / "own") == losses(tmp_path / "single")
    for name in ("fsdp2", "zero3"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "own"), abs=1e-6)


def test_rows_of_three_values_on_two_ranks(tmp_path: Path) -> None:
    outcomes = run_on_ranks(2, run_quietly, Triples, [*ARGV, "--output-dir", str(tmp_path / "out")])
    assert [status for status, _ in outcomes] == [2, 2]
    (said,) = [output for _, output in outcomes if "error: " in output]
    assert "have 3 values" in said
    assert "define collate()" in said
    assert not list(tmp_path.rglob("step-*"))

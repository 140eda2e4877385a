"""Usual rows of data sets are collated; others are refused with a message that says what a batch must be."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shardlaunch import Options, Recipe, UserError
from shardlaunch.launcher.batch_defaults import collated

RECIPE = Recipe(Options())
LINEAR = nn.Linear(2, 3)


def batch_of(*rows: Any) -> Any:
    """Return the default batch of some rows, in training."""
    return RECIPE.collate(list(rows), np.arange(len(rows)))


@pytest.mark.parametrize(
    "row",
    [
        (torch.tensor([1.0, 2.0]), 1),
        [np.array([1.0, 2.0], dtype=np.float32), np.int64(1)],
        (torch.tensor([1.0, 2.0]), torch.tensor(1)),
    ],
    ids=["tensor and int", "numpy", "tensors"],
)
def test_pairs_are_inputs_and_labels(row: Any) -> None:
    batch = batch_of(row, row, row)
    inputs, labels = batch
    assert batch["inputs"] is batch[0] is batch.inputs is inputs
    assert batch["labels"] is batch[1] is labels
    assert labels.tolist() == [1, 1, 1]
    assert RECIPE.num_targets(batch) == 3
    assert RECIPE.num_tokens(batch) == 0
    assert torch.equal(RECIPE.forward(LINEAR, batch), LINEAR(inputs))
    with pytest.raises(KeyError):
        batch["label"]


class Point(NamedTuple):
    """A row with named values."""

    x: int
    y: int
    z: int


def test_rows_with_names_keep_them() -> None:
    batch = batch_of({"inputs": torch.ones(2), "labels": 1}, {"inputs": torch.ones(2), "labels": 0})
    assert {name: column.shape for name, column in batch.items()} == {"inputs": (2, 2), "labels": (2,)}
    assert batch_of(Point(1, 2, 3), Point(4, 5, 6)).z.tolist() == [3, 6]
    columns = {"inputs": torch.ones(2, 2)}
    assert RECIPE.collate(columns, None) is columns


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(1, 2, 3)], r"have 3 values, \(int, int, int\).*define collate\(\)"),
        ([(torch.ones(2),)], r"have 1 value, \(Tensor \[2\]\).*define collate\(\)"),
        pytest.param([(Image.new("L", (2, 2)), 1)], r"the first is \(Image, int\).*images into tensors", id="image"),
        ([("good", 1), ("bad", 0)], "inputs in the data set's rows are text"),
        ([(1, "good"), (1, "bad")], "labels in the data set's rows are text"),
        (
            [(torch.ones(2), 1), (torch.ones(3), 1)],
            r"the first is \(Tensor \[2\], int\).*pad rows of different lengths",
        ),
        ([{"inputs": None}], r"\{'inputs': NoneType\}"),
        ([{"inputs": 1}, {"x": 1}], "cannot be collated"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_collated_are_refused(rows: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        collated(rows)
    assert "collate(samples, seeds) returns a batch: tensors by name" in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        (torch.tensor([1, 0, 2]), 3),
        (torch.tensor([1, -100, 2]), 2),
        (torch.tensor([[1, -100, 2], [0, 3, -100]]), 4),
        (torch.zeros(2, 3, 4, dtype=torch.uint8), 24),
        (torch.zeros(5), 5),
        (torch.zeros(5, 1), 5),
        (torch.zeros(5, dtype=torch.bool), 5),
        ([1, 2], 2),
    ],
    ids=str,
)
def test_what_counts_as_a_target(labels: Any, count: int) -> None:
    assert RECIPE.num_targets({"labels": labels}) == count


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"labels": torch.zeros(5, 2)}, r"shape \[5, 2\].*define num_targets"),
        ({"labels": torch.zeros(5, 2, dtype=torch.bool)}, "define num_targets"),
        ({"labels": ["good"]}, "labels are text"),
        ({"label": torch.zeros(5)}, "no 'labels' to count .it has 'label'"),
        (torch.zeros(5), "it is a Tensor"),
    ],
    ids=str,
)
def test_targets_that_cannot_be_counted(batch: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        RECIPE.num_targets(batch)


class Named(nn.Module):
    """A model whose arguments have names."""

    def forward(self, input_ids: torch.Tensor, *, mask: torch.Tensor | None = None, labels: Any = None) -> Any:
        assert labels is None
        return input_ids if mask is None else input_ids * mask


class TakesAny(Named):
    """One that takes others too."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:  # type: ignore[override]
        return sorted(others)


def test_columns_are_passed_by_name() -> None:
    ids = torch.arange(3)
    batch = {"input_ids": ids, "labels": ids, "length": ids}
    assert torch.equal(RECIPE.forward(Named(), batch), ids)
    assert torch.equal(RECIPE.forward(Named(), {**batch, "mask": 0 * ids}), 0 * ids)
    assert RECIPE.forward(TakesAny(), {**batch, "extra": ids}) == ["extra"]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_ids": 1, "masks": 1}, r"Named\.forward\(\) has no 'masks'.*define forward"),
        ({"labels": 1}, "no 'inputs' .it has 'labels'"),
        (torch.zeros(2), "it is a Tensor"),
        ({"inputs": ["text"]}, "inputs are text"),
    ],
    ids=str,
)
def test_columns_that_no_model_takes(batch: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        RECIPE.forward(Named(), batch)


def test_a_model_that_takes_other_names_is_not_called_with_just_anything() -> None:
    with pytest.raises(UserError, match="no 'x'"):
        RECIPE.forward(TakesAny(), {"x": torch.zeros(2)})

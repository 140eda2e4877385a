"""Data with an order of its own: what takes its place is refused or warned of, and so are options without effect."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Subset

from shardlaunch import Options, Recipe, UserError, orders
from shardlaunch.data import Mixture, Shards, load_shards
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.runs.choosing_order import chosen_order
from shardlaunch.launcher.runs.folds import checked_splits
from tests.shard_files import samples, write_json_lines


class _Ordered(Recipe):
    """Has the order and the data that a test sets."""

    chosen: Any = None
    data: Any = None

    def order(self, dataset: Any) -> Any:
        return self.chosen

    def datasets(self) -> dict[str, Any]:
        return {"train": self.data}


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Return 20 samples in one block."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_json_lines(tmp_path / "a.jsonl", samples(0, 20))
    return load_shards(str(tmp_path / "a.jsonl"))["train"]


def _recipe(chosen: Any = None, **options: Any) -> _Ordered:
    recipe = _Ordered(Options(**options))
    recipe.chosen = chosen
    return recipe


def test_blocks_have_their_own_order_unless_another_is_chosen(shards: Shards) -> None:
    assert isinstance(chosen_order(_recipe(), shards), type(orders.blockwise([1])))
    for recipe, is_warned in (
        (_recipe(order="sequential"), False),
        (_recipe(orders.blockwise([10, 10])), False),
        (_recipe(orders.weighted(np.ones(20))), True),
    ):
        with collected() as notes:
            assert chosen_order(recipe, shards) is not None
        assert bool(notes.warnings) == is_warned, notes.warnings
    assert "takes them from anywhere" in notes.warnings[0]


def test_what_has_no_effect_or_loses_the_order_is_refused(shards: Shards) -> None:
    plain = list(range(20))
    mixture = Mixture([(plain, 1), (shards, 1)])
    cases: list[tuple[_Ordered, Any, str]] = [
        (_recipe(), Subset(shards, [0, 1]), "a Subset of data that is read block by block"),
        (_recipe(), Subset(Subset(mixture, [0, 1]), [0]), "a Subset of data"),
        (_recipe(shuffle_window=5), plain, "--shuffle-window: has no effect"),
        (_recipe(shuffle_window=5, order="sequential"), shards, "--shuffle-window: has no effect"),
        (_recipe(data_weights=("5:1,1",)), plain, "--data-weights: has no effect, because the data is no mixture"),
        (_recipe(data_weights=("5:1,1",)), shards, "--data-weights: has no effect"),
        (_recipe(data_weights=("5:1,1",), order="sequential"), mixture, "--data-weights: has no effect"),
    ]
    for recipe, data, expected in cases:
        with pytest.raises(UserError, match=expected):
            chosen_order(recipe, data)
    recipe = _recipe(folds=2)
    for data in (shards, mixture):
        recipe.data = data
        with pytest.raises(UserError, match="--folds: the training data is read block by block, or mixed"):
            checked_splits(recipe, 0)

"""Which rows are held out: shares of classes, groups kept together, a function of the seed."""

from pathlib import Path

import datasets
import numpy as np
import pytest

from shardlaunch import Options, Recipe, UserError
from shardlaunch.data import FileOptions, load_splits
from shardlaunch.launcher.runs.folds import checked_splits
from shardlaunch.launcher.splitting import fold_of_samples, held_out_rows


@pytest.mark.parametrize("num_rows", [2, 10, 11, 30, 101])
def test_without_classes_the_tenth_is_that_of_the_datasets_library(num_rows: int) -> None:
    """So that runs of earlier versions hold out the same rows."""
    whole = datasets.Dataset.from_dict({"row": range(num_rows)}).train_test_split(test_size=0.1, seed=5)
    train, held_out = held_out_rows(num_rows, seed=5)
    assert whole["train"]["row"][:] == train.tolist()
    assert whole["test"]["row"][:] == held_out.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_each_class_has_its_share_and_none_is_held_out_as_a_whole(seed: int) -> None:
    classes = np.array([7] * 300 + [2] * 40 + [5] * 2 + [9])
    train, held_out = held_out_rows(len(classes), seed=seed, classes=classes)
    assert sorted([*train, *held_out]) == list(range(len(classes)))
    assert [int((classes[held_out] == number).sum()) for number in (7, 2)] == [30, 4]
    assert set(classes[train]) == {7, 2, 5, 9}
    assert 9 not in classes[held_out]


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(20, 200))
    groups, classes = rng.integers(0, 12, num_rows), rng.integers(0, 4, num_rows)
    classes[groups == 3] = 4  # a class of one group: it cannot be held out
    for given in (classes, None):
        train, held_out = held_out_rows(num_rows, seed=seed, classes=given, groups=groups)
        assert sorted([*train, *held_out]) == list(range(num_rows))
        assert len(held_out)
        assert not set(groups[train]) & set(groups[held_out])
        assert given is None or set(classes[train]) == set(classes)
        again = held_out_rows(num_rows, seed=seed, classes=given, groups=groups)
        assert (again[0] == train).all()
    folds = fold_of_samples(num_rows, 3, seed=seed, classes=classes, groups=groups)
    assert {len(set(folds[groups == group])) for group in set(groups)} == {1}
    assert set(folds) == {0, 1, 2}


def test_what_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match="each is the only one of its class"):
        held_out_rows(5, seed=0, classes=np.arange(5))
    with pytest.raises(UserError, match="of 2 groups none can be held out without a whole class"):
        held_out_rows(8, seed=0, classes=np.array([0, 1] * 4), groups=np.array([0, 1] * 4))
    with pytest.raises(UserError, match="--folds 3: --group-column has only 2 groups"):
        fold_of_samples(8, 3, seed=0, classes=None, groups=np.array([0, 1] * 4))


def test_the_group_column_is_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    rows = [f"text {number},{number % 2},patient {number % 7}" for number in range(70)]
    path.write_text("\n".join(["text,label,who", *rows]))
    columns = {"text": "text", "label": "label"}
    options = FileOptions(group_column="who", folds=3)
    splits = load_splits(str(path), seed=0, columns=columns, options=options)  # type: ignore[arg-type]
    by_split = [{text.split()[1] for text in split["text"][:]} for split in splits.values()]
    patients = [{int(number) % 7 for number in numbers} for numbers in by_split]
    assert not patients[0] & patients[1]
    assert patients[0] | patients[1] == set(range(7))
    assert splits["eval"].column_names.count("group") == 1

    class Grouped(Recipe):
        def datasets(self) -> dict[str, object]:
            return splits

    parts = checked_splits(Grouped(options), 1)
    assert not set(parts["train"]["group"][:]) & set(parts["eval"]["group"][:])
    assert Grouped(Options()).groups_of(splits["train"]) is None, "a column of that name means nothing by itself"
    with pytest.raises(UserError, match=r"--group-column ward: .* has no such column; it has .*'who'"):
        load_splits(str(path), seed=0, columns=columns, options=FileOptions(group_column="ward"))  # type: ignore[arg-type]
    (tmp_path / "train.csv").write_text(path.read_text())
    (tmp_path / "test.csv").write_text(path.read_text())
    path.unlink()
    with pytest.raises(UserError, match="--group-column who: nothing is divided"):
        load_splits(str(tmp_path), seed=0, columns=columns, options=FileOptions(group_column="who"))  # type: ignore[arg-type]

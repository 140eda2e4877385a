"""The cache: in its own folder, filled once, named by content."""

import errno
import threading
import time
from pathlib import Path

import datasets
import pytest

from shardlaunch import UserError
from shardlaunch.data import class_names, derived, load_splits
from shardlaunch.launcher.toolkit.cache import cache_dir, filled, refusal

ROWS = {"text": [f"line {number}" for number in range(20)], "label": [0, 1] * 10}


def _lengths(split: datasets.Dataset, calls: list[int] | None = None) -> list[int]:
    def lengths(texts: list[str]) -> dict[str, list[int]]:
        if calls is not None:
            calls.append(len(texts))
        return {"length": [len(text) for text in texts]}

    found: list[int] = derived(split, lengths, key=("lengths",), input_columns=["text"])["length"][:]
    return found


def test_a_saved_data_set_is_not_written_to(tmp_path: Path) -> None:
    """Nor is one with other content taken for it, whatever name is stored beside it."""
    calls: list[int] = []
    for number, rows in enumerate((ROWS, {**ROWS, "text": ["other"] * 20})):
        folder = tmp_path / str(number)
        made = datasets.Dataset.from_dict(rows)
        made._fingerprint = "the same"
        datasets.DatasetDict({"train": made, "test": made}).save_to_disk(folder)
        splits = load_splits(str(folder), seed=0)
        assert _lengths(splits["train"], calls) == [len(text) for text in rows["text"]]
        # A tenth of its rows, their classes and numbers are not written there either.
        made.map(lambda row: {"label": bool(row["label"])}).save_to_disk(folder / "inner")
        before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
        splits, _ = class_names(load_splits(str(folder / "inner"), seed=0), source="here")
        splits["train"].cast_column("label", datasets.Value("int32"))
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert calls == [20, 20]
    _lengths(load_splits(str(folder), seed=0)["train"], calls)
    assert calls == [20, 20]


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n" * 1 + "c,1\n" * 20)
    with pytest.raises(UserError, match=r"the cache folder .*file/datasets/shardlaunch cannot be written .*HF_HOME"):
        load_splits(str(tmp_path / "train.csv"), seed=0)
    with pytest.raises(UserError, match="cannot be written"):
        _lengths(datasets.Dataset.from_dict(ROWS))


def test_a_table_that_a_crash_cut_short_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "cut short,0\nnot,1\n" * 50)
    first = load_splits(str(path), seed=0)["train"]["text"][:]
    newest = max((cache_dir() / "tables").glob("*.arrow"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert load_splits(str(path), seed=0)["train"]["text"][:] == first


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"no space left for the cache of data in .*: make room, or set HF_HOME"):
        filled(cache_dir() / "full", full)
    assert not list(cache_dir().glob("full*.part"))


def test_two_at_once_fill_it_once(tmp_path: Path) -> None:
    calls = []

    def fill(path: Path) -> None:
        calls.append(path)
        time.sleep(0.2)
        path.write_text("whole")

    threads = [threading.Thread(target=filled, args=(tmp_path / "one", fill)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (tmp_path / "one").read_text() == "whole"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EIO, "Input/output error", "CACHE/x.arrow"), "the cache folder CACHE fails"),
        (OSError(errno.ESTALE, "Stale file handle", "CACHE"), "the cache folder CACHE fails"),
        (OSError(errno.EROFS, "Read-only file system"), "the cache folder CACHE cannot be written"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "CACHE/x.arrow"), "no space left for the cache of data in CACHE"),
        (OSError(errno.EIO, "Error writing bytes to file. Detail: [errno 5]"), "the cache folder CACHE fails"),
        (OSError(errno.EIO, "Input/output error", "/data/train.csv"), None),
        (OSError(errno.EACCES, "Permission denied", "/data/train.csv"), None),
        (ValueError("of another kind"), None),
    ],
    ids=str,
)
def test_errors_of_the_cache_are_told_from_those_of_the_data(error: Exception, says: str | None) -> None:
    folder = str(cache_dir())
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.replace("CACHE", folder)
    later = ValueError("I/O operation on closed file")  # as datasets raises it, when it goes on after the first
    later.__context__ = error
    for one in (error, later):
        found = refusal(one)
        assert (found and str(found).startswith(says.replace("CACHE", folder))) if says else found is None

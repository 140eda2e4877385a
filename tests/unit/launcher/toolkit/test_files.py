"""What lies at --data: every file is read, skipped and named, or refused."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from shardlaunch import UserError
from shardlaunch.data import FileOptions, load_splits
from shardlaunch.launcher.reporting.notes import collected

CSV = "text,label\n" + "".join(f"line {number},{number % 2}\n" for number in range(20))
COLUMNS = {"text": "text", "label": "label"}


def _texts(source: Path | str, **options: object) -> dict[str, list[str]]:
    """Return the texts of each split."""
    chosen = FileOptions(**options)  # type: ignore[arg-type]
    splits = load_splits(str(source), seed=0, columns=COLUMNS, options=chosen)  # type: ignore[arg-type]
    return {name: split["text"][:] for name, split in splits.items()}


def _write(folder: Path, **files: str) -> None:
    """Write files; of their names, __ stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_kinds_of_files_in_any_case_compressed_or_linked(tmp_path: Path) -> None:
    """One folder, each file of another kind: all rows are read."""
    table = {"text": ["a", "b"], "label": ["x", "y"]}
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    _write(elsewhere, rows__CSV="text,label\nlinked,x\n")
    _write(
        folder,
        train_1__CSV="text,label\na,x\nb,y\n",
        train_2__tsv="text\tlabel\na\tx\nb\ty\n",
        train_3__Json=json.dumps(table),
        train_4__json=json.dumps(rows),
        train_5__JSONL="\n".join(map(json.dumps, rows)),
        train_6__json="\n".join(map(json.dumps, rows)) + "\n",
        train_7__json=pd.DataFrame(table).to_json(),
        test__csv="text,label\nheld out,x\n",
    )
    (folder / "train_8.csv.GZ").write_bytes(gzip.compress(b"text,label\na,x\n") + gzip.compress(b"b,y\n"))
    (folder / "train_9.jsonl.zst").write_bytes(pa.compress(b'{"text": "a", "label": "x"}', "zstd", asbytes=True))
    pd.DataFrame(table).to_parquet(folder / "train_a.parquet")
    pd.DataFrame(table).astype("category").to_parquet(folder / "train_b.PARQUET")
    pd.DataFrame(table).to_feather(folder / "train_c.arrow")
    (folder / "train_d.CSV").symlink_to(elsewhere / "rows.CSV")
    found = _texts(folder)
    assert sorted(found["train"]) == ["a"] * 12 + ["b"] * 11 + ["linked"]
    assert found["eval"] == ["held out"]


def test_files_in_folders_several_files_and_patterns(tmp_path: Path) -> None:
    _write(tmp_path / "data" / "train", part_0__csv=CSV, part_1__csv=CSV)
    _write(tmp_path / "data" / "test", part_0__csv=CSV)
    assert {name: len(texts) for name, texts in _texts(tmp_path / "data").items()} == {"train": 40, "eval": 20}
    _write(tmp_path / "my data", a__csv=CSV, b__csv=CSV)
    (tmp_path / "link").symlink_to(tmp_path / "my data", target_is_directory=True)
    assert len(_texts(tmp_path / "link" / "*.csv")["train"]) == 36
    assert len(_texts(tmp_path / "my data" / "a.csv")["train"]) == 18
    with pytest.raises(UserError, match=r"a.csv is given twice; name it once"):
        _texts(f"'{tmp_path}/my data' '{tmp_path}/my data/a.csv'")
    (tmp_path / "my data" / "README.md").write_text("")
    (tmp_path / "my data" / "b.doc").write_text("")
    assert len(_texts(tmp_path / "my data" / "*", ignore_files=("*.doc",))["train"]) == 36
    with pytest.raises(UserError, match=r"--data a.csv none.csv: no such file or folder: a.csv"):
        _texts("a.csv none.csv")
    several = f"{tmp_path}/data/train/part_0.csv '{tmp_path}/my data/a.csv'"
    assert len(_texts(several)["train"]) == 36


def test_junk_is_skipped_and_named_and_so_is_what_a_pattern_means(tmp_path: Path) -> None:
    _write(tmp_path, train__csv=CSV, test__csv=CSV, README__md="", LICENSE="", __DS_Store="", notes__docx="")
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / "old").mkdir()
    _write(tmp_path / "old", train__csv=CSV)
    with collected() as notes:
        assert len(_texts(tmp_path, ignore_files=("*.docx", "old"))["train"]) == 20
    assert any("not read: .DS_Store, .git, LICENSE and 3 more" in text for text in notes.data), notes.data
    with pytest.raises(UserError, match=r"--ignore-files \*\.zip: no file of .* has such a name"):
        _texts(tmp_path, ignore_files=("*.docx", "old", "*.zip"))


def _loop(folder: Path) -> None:
    (folder / "inner").symlink_to(folder, target_is_directory=True)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: _write(folder, notes__docx=""), r"notes.docx: not of a kind that is read .* --ignore-files"),
        (lambda folder: _write(folder, extra__tsv="a\tb\n"), r"extra.tsv must have a name that starts with train"),
        (lambda folder: _write(folder / "sub", more__csv=CSV), r"more.csv must have a name that starts with train"),
        (lambda folder: (folder / "train2.csv").symlink_to("none.csv"), r"train2.csv is a link to nothing"),
        (lambda folder: os.mkfifo(folder / "train.jsonl"), r"train.jsonl is neither a file nor a folder"),
        (_loop, r"inner is a link to a folder that it lies in"),
        (lambda folder: _write(folder, train__csv__gz="text"), r"train.csv.gz: not readable"),
        (lambda folder: _write(folder, train_2__csv="text,label\nagain,no\n"), None),
        (lambda folder: _write(folder, train_2__jsonl='{"text": "a", "label": 1}'), None),
        (lambda folder: _write(folder, train_2__jsonl='{"text": "a", "label": "1"}'), r"column 'label' is text, but"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path: Path, spoil: Callable[[Path], object], says: str | None) -> None:
    _write(tmp_path, train__csv=CSV, test__csv=CSV)
    spoil(tmp_path)
    if says is None:
        assert len(_texts(tmp_path)["train"]) == 21
        return
    with pytest.raises(UserError, match=says):
        _texts(tmp_path)


def test_texts_under_any_name(tmp_path: Path) -> None:
    """For a language model; also in folders. What is no text is refused."""
    _write(tmp_path / "books" / "one", chapter="First.\r\nEnd", notes__md="Second.")
    _write(tmp_path / "books", code__py="Third.")
    splits = load_splits(str(tmp_path / "books"), seed=0, columns={"text": "text"}, of_texts=True)
    assert sorted(splits["train"]["text"][:] + splits["eval"]["text"][:]) == ["First.\nEnd", "Second.", "Third."]
    (tmp_path / "books" / "picture").write_bytes(b"\x89PNG\0")
    with pytest.raises(UserError, match=r"picture: line 1 is not in the encoding utf-8 .byte 0x89"):
        load_splits(str(tmp_path / "books"), seed=0, columns={"text": "text"}, of_texts=True)


def test_content_decides_what_is_read_again(tmp_path: Path) -> None:
    """A file replaced by another of the same path, size and time is another; a copy elsewhere is the same."""
    path = tmp_path / "train.csv"
    fingerprints = []
    for word in ("one", "two", "one"):
        path.write_text("text,label\n" + f"{word} a,0\n{word} b,1\n" * 5)
        os.utime(path, ns=(10**18, 10**18))
        splits = load_splits(str(path), seed=0, columns=COLUMNS)  # type: ignore[arg-type]
        assert all(text.startswith(word) for text in splits["train"]["text"][:])
        fingerprints.append(splits["train"]._fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
    shutil.copy(path, tmp_path / "copy.csv")
    copied = load_splits(str(tmp_path / "copy.csv"), seed=0, columns=COLUMNS)  # type: ignore[arg-type]
    assert copied["train"]._fingerprint == fingerprints[2]
    assert _texts(path, delimiter=",") == {name: split["text"][:] for name, split in copied.items()}


@pytest.mark.parametrize("name", ["notes.pdf", "photo.JPEG", "old.tar.gz", "song.mp3", "report.docx", "weights.bin"])
def test_what_is_no_text_is_not_read_as_text(name: str, tmp_path: Path) -> None:
    """Its bytes could be read as text; source code, pages and files without a suffix are texts."""
    _write(
        tmp_path, story="Once.", code__py="print()", page__html="<p>", paper__tex="a", mark__svg="<svg/>", run__sh="a"
    )
    assert len(load_splits(str(tmp_path), seed=0, of_texts=True)["train"]) > 0
    (tmp_path / name).write_text("%PDF")
    with pytest.raises(UserError, match=rf"{name}: not text. .*--ignore-files"):
        load_splits(str(tmp_path), seed=0, of_texts=True)

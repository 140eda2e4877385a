"""Cells of CSV and JSON files: nothing is guessed, and what has no one meaning is refused by line or row."""

import json
from pathlib import Path
from typing import Any

import pytest

from shardlaunch import UserError
from shardlaunch.data import FileOptions, class_names, load_splits
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.toolkit import csv_files

LABELLED: dict[str, Any] = {"text": "text", "label": "label"}


def _read(path: Path, columns: dict[str, Any] | None = LABELLED, **options: str) -> dict[str, list[Any]]:
    """Return the columns of all rows of a file, in its order."""
    splits = load_splits(str(path), seed=0, columns=columns, options=FileOptions(**options))  # type: ignore[arg-type]
    return {name: splits["train"][name][:] for name in splits["train"].column_names}


def _with(folder: Path, content: str | bytes, name: str = "train.csv") -> Path:
    """Write the content as training data; evaluation data beside it keeps it whole."""
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    (folder / "test.csv").write_text("text,label,score\nx,0,1\ny,1,2\n")
    return folder


def test_only_an_empty_cell_is_missing(tmp_path: Path) -> None:
    words = ["None", "null", "NA", "nan", "N/A", "#N/A", "NULL", "-", "12345", "1e5", "2024-01-01", "true", " x "]
    folder = _with(tmp_path, "text,label\n" + "".join(f"{word},{word}\n" for word in words))
    assert _read(folder) == {"text": words, "label": words}


@pytest.mark.parametrize("cell", ["", '""'])
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_cell_is_named(tmp_path: Path, column: str, cell: str) -> None:
    row = {"text": "c", "label": "1", column: cell}
    folder = _with(tmp_path, f'text,label\na,0\n"b\n",1\n{row["text"]},{row["label"]}\n')
    with pytest.raises(UserError, match=rf"train.csv: row 3 is without a '{column}' \(an empty cell\)"):
        _read(folder)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["0", "10", "2"], [0, 10, 2]),
        (["-1", "3", "0"], [-1, 3, 0]),
        (["01", "02", "1"], ["01", "02", "1"]),
        (["1", "x", "2"], ["1", "x", "2"]),
        (["True", "False", "True"], ["True", "False", "True"]),
        (["99999999999999999999", "1", "2"], ["99999999999999999999", "1", "2"]),
    ],
    ids=str,
)
def test_labels_are_whole_numbers_if_all_are(tmp_path: Path, labels: list[str], expected: list[Any]) -> None:
    content = "text,label\n" + "".join(f"a,{label}\n" for label in labels)
    (tmp_path / "train.csv").write_text(content)
    (tmp_path / "test.csv").write_text(content)
    assert _read(tmp_path)["label"] == expected


def test_fractions_are_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "a,1.0\nb,0.0\n" * 10)
    splits = load_splits(str(path), seed=0, columns=LABELLED)
    with pytest.raises(UserError, match="must hold class labels"):
        class_names(splits, source="here")


def test_numbers(tmp_path: Path) -> None:
    folder = _with(tmp_path, "text,score\n" + "a, 1.5 \nb,-2e-3\nc,7\n")
    kinds = {"text": "text", "score": "number"}
    assert _read(folder, kinds)["score"] == [1.5, -0.002, 7.0]
    for bad in ("1,5", "n/a", "inf"):
        _with(tmp_path, f'text,score\na,1\nb,"{bad}"\n')
        with pytest.raises(UserError, match=rf"row 2 has '{bad}' for 'score', which is not a number"):
            _read(tmp_path, kinds)


def test_without_kinds_all_cells_decide(tmp_path: Path) -> None:
    """For recipes that do not say what a column is for. Later cells count as much as the first ones."""
    rows = "".join(f"{number},0.5,{number},true,\n" for number in range(3000)) + "1,2,x,false,word\n"
    (tmp_path / "train.csv").write_text("whole,part,mixed,truth,late\n" + rows)
    (tmp_path / "test.csv").write_text("whole,part,mixed,truth,late\n1,1,1,true,1\n")
    found = _read(tmp_path, None)
    assert [type(column[0]) for column in found.values()] == [int, float, str, bool, type(None)]
    assert [column[-1] for column in found.values()] == [1, 2.0, "x", False, "word"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\na,0\nb,1,\n", "line 3 has 3 fields, but the first line has 2 names"),
        ("text,label\na,0,\nb,1,\n", "line 2 has 3 fields"),
        ('text,label\n"a\nb",0\n"c\n\nd"\n', "line 4 has 1 fields"),
        ('text,label\n"a,0\nb,1\n', "line 4: a quote is not closed|line 3: a quote is not closed"),
        ('text,label\na,0\nb,"1\nc,0\n', "a quote is not closed"),
        ('text,label\n"say \\"hi\\"",0\n', "line 2: a quote is not closed, or"),
        ("text,label,text\na,0,b\n", "several columns are called 'text'"),
        ("text,label\na,0\ntext,label\nb,1\n", "row 2 repeats the names of the first line"),
        ("\n\n", "the file is empty"),
        ("text,label\n", "no rows"),
        ("text,label", "no rows"),
        ("text,label\na,0\n".encode("utf-16-le"), "holds null bytes; if it is a text in UTF-16, choose --encoding"),
        (b"text,label\na,0\ncaf\xe9,1\n", r"line 3 is not in the encoding utf-8 \(byte 0xe9\); choose with --encoding"),
    ],
    ids=str,
)
def test_what_is_no_table(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        _read(_with(tmp_path, content))


def test_quotes_delimiters_and_encodings(tmp_path: Path) -> None:
    """Found, or given; whatever is not the usual is said."""
    for content, options, texts, says in (
        ('text,label\n"a, ""b""",0\n5" c,1\n"d\r\ne",1\n', {}, ['a, "b"', '5" c', "d\r\ne"], ""),
        ("label;text\n0;a, b\n1;c\n", {}, ["a, b", "c"], "delimiter semicolon"),
        ("label|text\n0|a;b\n1|c\n", {"delimiter": "|"}, ["a;b", "c"], "delimiter bar"),
        (b"\xef\xbb\xbftext,label\r\nb\xc3\xa9,0\r\n\r\nc,1\r\n", {}, ["bé", "c"], ""),
        ("text,label\ncafé,0\n".encode("utf-16"), {}, ["café"], "utf-16"),
        ("text,label\ncafé,0\n".encode("cp1252"), {"encoding": "cp1252"}, ["café"], "cp1252"),
    ):
        with collected() as notes:
            assert _read(_with(tmp_path, content), **options)["text"] == texts  # type: ignore[arg-type]
        assert says in str(notes.data), notes.data
    (tmp_path / "train.csv").unlink()
    _with(tmp_path, 'text\tlabel\n"a\t0\nsay "b"\t1\n', "train.tsv")
    with collected() as notes:
        assert _read(tmp_path)["text"] == ['"a', 'say "b"']
    assert "quotes as text" in str(notes.data)
    with pytest.raises(UserError, match="--encoding klingon: unknown"):
        FileOptions(encoding="klingon")
    with pytest.raises(UserError, match="--delimiter ::"):
        FileOptions(delimiter="::")


def test_a_row_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "BLOCK_BYTES", 1 << 10)
    assert _read(_with(tmp_path, f'text,label\n"{"a " * 5000}\n",0\nb,1\n'))["text"] == ["a " * 5000 + "\n", "b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a", "label": 0}\n{"text": "b"', r"line 2 is not a JSON object"),
        ('{"text": "a", "label": 0}\n[1]', r"line 2 is a list of 1; expected an object per line"),
        ('{"text": "a", "text": "b", "label": 0}\n', r"a name is given twice: 'text'"),
        ('{"text": "a", "label": 0}\n{"text": 1, "label": 0}', r"'text' is a number in row 2, but text before"),
        ('{"text": "a", "label": 0}\n{"text": null, "label": 0}', r"row 2 is without a 'text'; complete or remove it"),
        ('{"text": "a", "label": 0}\n{"label": 0}', r"row 2 is without a 'text'"),
        ('{"data": [{"text": "a", "label": 0}]}', r"the records are inside 'data'; expected"),
        ('{"text": ["a", "b"], "label": [0]}', r"an object of 'text' a list of 2, 'label' a list of 1; expected"),
        ("3", r"holds a number; expected"),
        ("[]", r"no rows|no column"),
    ],
    ids=str,
)
def test_json_that_has_no_one_meaning(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=says):
        _read(tmp_path / "data.json")


def test_dates_in_json_are_text(tmp_path: Path) -> None:
    rows = [{"text": f"2024-01-{day:02}", "label": "2024-01-01T00:00:00"} for day in range(1, 21)]
    (tmp_path / "data.jsonl").write_text("\u2028\n".join(map(json.dumps, rows)).replace("\u2028", " "))
    assert set(_read(tmp_path / "data.jsonl")["text"]) <= {row["text"] for row in rows}


def test_classes_that_are_alike_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + 'a,pos\nb,"pos "\nc,Pos\nd,neg\n' * 5)
    with collected() as notes:
        class_names(load_splits(str(path), seed=0, columns=LABELLED), source="here")
    (warning,) = notes.warnings
    assert "'Pos', 'pos', 'pos ' of column 'label' are different classes" in warning

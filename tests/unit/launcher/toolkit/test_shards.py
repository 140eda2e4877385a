"""Data that is read block by block: the same samples from every kind of file, few in memory, damage told."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardlaunch import Options, UserError
from shardlaunch.data import Shards, load_shards
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.runs.identity import data_fingerprint
from shardlaunch.launcher.toolkit.files import FileOptions
from shardlaunch.launcher.toolkit.shards import json_lines, mds, tar
from tests.shard_files import WRITERS, add_member, samples, write_json_lines, write_parquet, write_tar


@pytest.fixture(autouse=True)
def _small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 600)
    monkeypatch.setattr(tar, "BLOCK_BYTES", 30_000)
    monkeypatch.setattr(mds, "BLOCK_BYTES", 400)


def _folder(tmp_path: Path, kind: str, counts: tuple[int, ...] = (25, 7, 31)) -> Path:
    folder = tmp_path / kind
    folder.mkdir()
    first = 0
    for number, count in enumerate(counts):
        WRITERS[kind](folder / f"part-{number:03}.{kind}", samples(first, count))
        first += count
    return folder


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    names = {"number.id": "number"}
    return {names.get(name, name): np.asarray(value).tolist() for name, value in row.items() if name != "__key__"}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_has_the_same_samples_and_holds_few(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    with collected() as notes:
        data = load_shards(str(_folder(tmp_path, kind)))["train"]
    assert len(data) == 63
    expected = [_plain(row) for row in samples(0, 63)]
    assert [_plain(data[n]) for n in range(63)] == expected
    assert _plain(data[-1]) == expected[-1]
    with pytest.raises(IndexError):
        data[63]
    num_blocks = len(data._index.blocks)
    assert 5 <= num_blocks <= 20, "small blocks, for this test"
    assert f"train: 63 samples in {num_blocks} blocks of 3" in notes.data[0]

    order = data.shuffled_order(Options(shuffle_window=20))
    data.hold_samples(order, 1)
    read: list[int] = []
    monkeypatch.setattr(data, "_read", lambda number, read_block=data._read: read.append(number) or read_block(number))
    data._held.clear()
    seen = []
    for n in order.samples(0, 0, np.arange(63)).tolist():
        seen.append(_plain(data[n])["number"])
        assert sum(map(len, data._held.values())) <= 20 + data._index.sizes.max()
    assert sorted(seen) == list(range(63))
    assert sorted(read) == list(range(num_blocks)), "each block is read once"


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_that_are_not_wanted_are_not_read(kind: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, kind, (12,))
    data = load_shards(str(folder), columns=["txt", "cls"])["train"]
    assert _plain(data[11]) == {"txt": "text 11", "cls": 2}
    with pytest.raises(UserError, match=r"part-000.*no (column|field)|part-000.*sample 0.*none of|part-000"):
        load_shards(str(folder), columns=["missing"])["train"][0]


def test_the_index_is_made_once_and_follows_the_content(tmp_path: Path, monkeypatch: Any) -> None:
    folder = _folder(tmp_path, "jsonl")
    first = data_fingerprint(load_shards(str(folder))["train"])
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.setattr(json_lines.JsonLinesShards, "blocks", lambda *_: pytest.fail("found again"))
    assert data_fingerprint(load_shards(str(moved))["train"]) == first
    monkeypatch.undo()
    file = moved / "part-001.jsonl"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("text 26", "TEXT 26"))
    os.utime(file, ns=times)  # the same size and time
    assert data_fingerprint(load_shards(str(moved))["train"]) != first
    shouted = load_shards(str(moved), transform=lambda row: {"txt": row["txt"].upper()})["train"]
    assert shouted[0] == {"txt": "TEXT 0"}
    assert data_fingerprint(shouted) not in (first, data_fingerprint(load_shards(str(moved))["train"]))


def test_a_file_that_changes_during_the_run_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "parquet")
    data = load_shards(str(folder))["train"]
    file = folder / "part-001.parquet"
    os.utime(file, ns=(1, 1))
    data[25]  # only its time is another
    write_parquet(file, samples(100, 7))
    data._held.clear()
    with pytest.raises(UserError, match=r"part-001.parquet: changed since the run was started"):
        data[25]
    file.unlink()
    data._held.clear()
    with pytest.raises(UserError, match=r"part-001.parquet: samples 0 to 6 cannot be read: .*No such file"):
        data[25]


def test_splits_and_files_that_are_no_shards(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name, first in (("train", 0), ("validation", 10)):
        (folder / name).mkdir(parents=True)
        WRITERS["mds"](folder / name / "shard.00000.mds", samples(first, 4))
        index = {"version": 2, "shards": [{"raw_data": {"basename": "shard.00000.mds"}, "zip_data": None}]}
        (folder / name / "index.json").write_text(json.dumps(index))
    splits = load_shards(str(folder))
    assert {name: split[0]["number"] for name, split in splits.items()} == {"train": 0, "eval": 10}
    (folder / "train" / "index.json").write_text(json.dumps({"shards": [{"raw_data": {"basename": "other.mds"}}]}))
    with pytest.raises(UserError, match=r"index.json: names other.mds, which is not there"):
        load_shards(str(folder))
    (folder / "notes.md").write_text("x")
    for name in ("train", "validation"):
        (folder / name / "index.json").unlink()
    with pytest.raises(UserError, match=r"notes.md: not of a kind that is read block by block"):
        load_shards(str(folder))
    assert len(load_shards(str(folder), options=FileOptions(ignore_files=("*.md",)))["train"]) == 4
    write_tar(folder / "train" / "a.tar", samples(0, 2))
    with pytest.raises(UserError, match="files of several kinds"):
        load_shards(str(folder), options=FileOptions(ignore_files=("*.md",)))


def _cut(path: Path, part: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def _cut_between_members(path: Path) -> None:
    with tarfile.open(path) as archive:
        end = archive.getmembers()[5].offset
    path.write_bytes(path.read_bytes()[:end])


def _damaged_header(path: Path) -> None:
    with tarfile.open(path) as archive:
        start = archive.getmembers()[8].offset
    data = bytearray(path.read_bytes())
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(bytes(data))


def _page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4:60] = os.urandom(56)
    path.write_bytes(bytes(data))


def _other_columns(path: Path) -> None:
    write_parquet(path, [{**row, "cls": str(row["cls"])} for row in samples(25, 7)])


def _members(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for name in names:
                add_member(archive, name, b"1")

    return write


def _link(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(member)


def _line(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], text, *lines[4:]]) + "\n")

    return change


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut parquet": ("parquet", _cut, r"Parquet"),
    "page of parquet": ("parquet", _page, r"samples 0 to \d+ cannot be read"),
    "types": ("parquet", _other_columns, r"column 'cls' is string, but int64 in .*part-000"),
    "no bytes": ("parquet", lambda path: path.write_bytes(b""), "the file is empty"),
    "no parquet": ("parquet", lambda path: path.write_text("hello " * 9), "Parquet magic bytes"),
    "cut tar": ("tar", _cut, r"unexpected end of data|cut short|cannot be read beyond"),
    "cut tar between members": ("tar", _cut_between_members, "cut short: no end is marked"),
    "header of tar": ("tar", _damaged_header, "cannot be read beyond byte .* damaged"),
    "no name": ("tar", _members("a.txt", "b"), "member 'b' is not named KEY.NAME"),
    "twice": ("tar", _members("a.txt", "a.txt"), r"sample 0 \(a\) has 'txt' twice"),
    "fields": ("tar", _members("a.txt", "a.cls"), r"sample 0 \(a\) has cls, txt, but those of .*part-000"),
    "link": ("tar", _link, "a.txt is a link"),
    "no tar": ("tar", lambda path: path.write_text("hello " * 999), "invalid header"),
    "bad line": ("jsonl", _line("{'a': 1}"), "sample 2 "),
    "line is a list": ("jsonl", _line("[1]"), "sample 2 is no JSON object but list"),
    "line is nested": ("jsonl", _line("[" * 100_000), "sample 2 is nested too deeply"),
    "line in another encoding": ("jsonl", lambda path: path.write_bytes('{"a": "é"}\n'.encode("cp1252")), "utf-8"),
    "cut mds": ("mds", _cut, "cut short"),
    "no mds": ("mds", lambda path: path.write_bytes(b"hello " * 999), "no MDS file|too early"),
    "nothing but blanks": ("mds", lambda path: path.write_bytes(b"\0" * 4), "too early"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_ends_in_one_message_that_names_the_file(case: str, tmp_path: Path) -> None:
    kind, damage, expected = DAMAGE[case]
    folder = _folder(tmp_path, kind)
    damage(folder / f"part-001.{kind}")
    with pytest.raises(UserError, match=rf"(?s)part-001\.{kind}: .*({expected})"):
        _read_all(load_shards(str(folder))["train"])


def _read_all(data: Shards) -> None:
    for n in range(len(data)):
        data[n]


def test_shards_without_samples_are_said_and_none_at_all_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "parquet", (5,))
    write_parquet(folder / "part-001.parquet", samples(0, 1))
    import pyarrow.parquet as pq

    empty = pq.read_table(folder / "part-001.parquet").slice(0, 0)
    pq.write_table(empty, folder / "part-001.parquet")
    with collected() as notes:
        assert len(load_shards(str(folder))["train"]) == 5
    assert "without samples: part-001.parquet" in notes.data
    with pytest.raises(UserError, match="no samples"):
        load_shards(str(folder / "part-001.parquet"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no files of"):
        load_shards(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_shards("owner/name")
    with tarfile.open(tmp_path / "nothing" / "a.tar", "w"):
        pass
    with pytest.raises(UserError, match="no samples"):
        load_shards(str(tmp_path / "nothing"))
    write_json_lines(tmp_path / "a.jsonl", samples(0, 2))
    (tmp_path / "a.jsonl").rename(tmp_path / "a.jsonl.gz")
    with pytest.raises(UserError, match="compressed"):
        load_shards(str(tmp_path / "a.jsonl.gz"))


def test_values_that_arrow_has_in_other_forms(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "tokens": pa.array([[1, 2], [], [3]], pa.list_(pa.int32())),
            "with_none": pa.array([[1, None], None, [3]], pa.list_(pa.int32())),
            "pair": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
            "number": pa.array([1.5, None, 2.5]),
            "yes": pa.array([True, False, True]),
            "words": pa.array(["a", "b", "a"]).dictionary_encode(),
            "inner": pa.array([{"a": 1}, {"a": 2}, None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    data = load_shards(str(tmp_path / "a.parquet"))["train"]
    rows = [{name: getattr(value, "tolist", lambda v=value: v)() for name, value in data[n].items()} for n in range(3)]
    assert rows == table.to_pylist()
    assert data[0]["tokens"].dtype == np.int32
    assert isinstance(data[1]["pair"], np.ndarray)
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object))  # a pickle
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_member(archive, "x.npy", buffer.getvalue())
    with pytest.raises(UserError, match=r"a.tar: sample 0 field 'npy' cannot be decoded: .*allow_pickle"):
        load_shards(str(tmp_path / "a.tar"))["train"][0]

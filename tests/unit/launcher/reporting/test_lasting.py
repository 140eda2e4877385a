"""Logs while the disk fails: nothing is lost, nothing is written twice, and it is said once."""

import errno
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardlaunch.launcher.reporting.console import LastingConsole
from shardlaunch.launcher.reporting.lasting import MOST_KEPT, LastingFile
from shardlaunch.launcher.reporting.tracking import MetricsLog


class Disk:
    """`os.pwrite` and `os.fsync` of a disk that fails as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = self.is_lossy = False
        self.most_bytes = 10**9
        self._pwrite, self._fsync = os.pwrite, os.fsync
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._pwrite(descriptor, data[: self.most_bytes], offset)

    def fsync(self, descriptor: int) -> None:
        if self.is_lossy:  # as Linux: what could not be written is dropped, and the next fsync is a success
            self.is_lossy = False
            os.ftruncate(descriptor, 0)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Return a disk that does not fail yet."""
    return Disk(monkeypatch)


def _lines(path: Path) -> list[Any]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_wait_while_the_disk_is_full(disk: Disk, tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricsLog(tmp_path, resumed_step=0, warn=said.append)
    for step in range(1, 10):
        disk.is_full = 3 <= step <= 7
        log.write({"step": step})
        if step == 7:
            assert _lines(log.path) == [1, 2]
            with pytest.raises(OSError, match="No space left") as caught:
                log.sync()
            assert caught.value.filename == str(log.path)
    log.sync()
    log.close()
    assert _lines(log.path) == list(range(1, 10))
    assert [text.partition(" (")[0] for text in said] == [
        "metrics.jsonl cannot be written",
        "metrics.jsonl is written again, without a gap",
    ]


def test_what_an_fsync_has_lost_is_written_again(disk: Disk, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resumed_step=0, warn=lambda text: None)
    log.write({"step": 1})
    disk.is_lossy = True
    with pytest.raises(OSError, match="Input/output"):
        log.sync()
    log.write({"step": 2})
    log.sync()
    assert _lines(log.path) == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_any_errors_lose_nothing(disk: Disk, tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    file = LastingFile(tmp_path / "log", prepare=lambda: 0, warn=lambda text: None)
    expected = b""
    for _ in range(60):
        disk.is_full = random_.random() < 0.4
        disk.most_bytes = random_.choice((1, 7, 10**9))
        data = random_.randbytes(random_.randrange(1, 40))
        expected += data
        file.append(data)
        if random_.random() < 0.1:
            try:
                file.sync()
            except OSError:
                assert disk.is_full
    disk.is_full = False
    file.close()
    assert (tmp_path / "log").read_bytes() == expected


def test_a_log_that_cannot_be_cut_back_yet_is_cut_back_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
        log = MetricsLog(tmp_path, resumed_step=2, warn=said.append)
        log.write({"step": 3})
        assert _lines(path) == [1, 2, 3], "as it was"
    log.write({"step": 4})
    log.close()
    assert _lines(path) == [1, 2, 3, 4]
    assert len(said) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_lost_in_the_end_is_said(disk: Disk, tmp_path: Path) -> None:
    said: list[str] = []
    file = LastingFile(tmp_path / "log", prepare=lambda: 0, warn=said.append)
    disk.is_full = True
    file.append(b"x\n")
    file.close()
    assert said[-1] == f"{tmp_path / 'log'}: what was kept in memory could not be written, and is lost"


def test_memory_is_bounded_while_all_is_well(tmp_path: Path) -> None:
    file = LastingFile(tmp_path / "log", prepare=lambda: 0, warn=lambda text: None)
    for _ in range(5):
        file.append(bytes(MOST_KEPT // 2))
        assert len(file._kept) <= MOST_KEPT
    file.close()
    assert (tmp_path / "log").stat().st_size == 5 * (MOST_KEPT // 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPIPE])
def test_output_that_cannot_be_written_ends_nothing(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk, a terminal that was closed, a reader that has gone."""

    class Broken(io.StringIO):
        def flush(self) -> None:
            raise OSError(number, os.strerror(number))

    console: Console = LastingConsole(file=Broken())
    console.print("one")
    console.print("two")
    err = capsys.readouterr().err
    assert err.count("warning: output cannot be written") == 1
    assert os.strerror(number) in err

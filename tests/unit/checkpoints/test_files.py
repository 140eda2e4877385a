"""Files and folders changed while the file system fails: whole or not at all, named, and tried again."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardlaunch.checkpoints import files
from shardlaunch.checkpoints.files import (
    PassingError,
    delete_tree,
    discard,
    error_text,
    fsync,
    is_there,
    make_folder,
    replace_file,
    retried,
)
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import checkpoint_steps, newest_valid
from shardlaunch.checkpoints.retention import prune, sweep
from shardlaunch.errors import UserError


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))


def failing(function: Callable[..., Any], number: int, *, times: int = 10**9, on: str = "") -> Callable[..., Any]:
    """Return a function that raises an OSError the first times that it is called with a path that has `on` in it."""
    left = [times]

    def fails_first(*args: Any, **options: Any) -> Any:
        if left[0] and on in str(args[0]):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return function(*args, **options)

    return fails_first


@pytest.mark.parametrize("function", ["fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    path = tmp_path / "run.json"
    replace_file(path, b"old")
    monkeypatch.setattr(os, function, failing(getattr(os, function), number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        replace_file(path, b"new")
    assert str(tmp_path) in error_text(caught.value) or function == "rename"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_an_error_that_passes_is_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, times=2))
    replace_file(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_bytes() == b"new"


@pytest.mark.parametrize(("number", "times"), [(errno.EIO, 4), (errno.ESTALE, 4), (errno.ENOSPC, 1), (errno.EACCES, 1)])
def test_only_what_may_pass_is_tried_again(number: int, times: int) -> None:
    calls = []

    def work() -> None:
        calls.append(None)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        retried(work)
    assert len(calls) == times


def test_the_cause_of_a_refusal_may_pass() -> None:
    def work() -> None:
        try:
            raise OSError(errno.EIO, "Input/output error", "there")
        except OSError as error:
            raise UserError("not readable") from error

    with pytest.raises(UserError, match="not readable"):
        retried(work)
    with pytest.raises(PassingError, match="not readable"):
        Peers().together(work)


def test_what_cannot_be_found_out_is_not_taken_for_a_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_there(tmp_path / "none")
    monkeypatch.setattr(os, "lstat", failing(os.lstat, errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        is_there(tmp_path)


def test_checkpoints_that_cannot_be_read_now_are_not_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No message advises to start anew, where the disk may come back with all checkpoints on it."""
    (tmp_path / "step-00000004").mkdir()
    monkeypatch.setattr(os, "lstat", failing(os.lstat, errno.EIO, on="step-00000004"))
    with pytest.raises(PassingError, match=r"Input/output error.*the same command resumes"):
        newest_valid(tmp_path, peers=Peers(), warn=lambda text: None)
    monkeypatch.setattr(os, "scandir", failing(os.scandir, errno.ESTALE))
    with pytest.raises(PassingError, match=rf"{tmp_path}: Stale file handle.*the same command resumes"):
        newest_valid(tmp_path, peers=Peers(), warn=lambda text: None)


def test_as_much_as_possible_is_deleted_and_the_rest_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    for name in "abc":
        (folder / name).touch()
    monkeypatch.setattr(os, "unlink", failing(os.unlink, errno.EBUSY, on="b"))
    with pytest.raises(OSError, match="busy") as caught:
        discard(folder)
    trash = tmp_path / ".trash-step-00000001"
    assert error_text(caught.value) == f"{trash / 'b'}: Device or resource busy"
    assert [path.name for path in trash.iterdir()] == ["b"], "no half of it under the old name"
    monkeypatch.undo()
    assert not sweep(tmp_path)
    assert not list(tmp_path.iterdir())
    delete_tree(folder)  # it is gone


def test_what_retention_could_not_delete_is_returned_and_later_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 5):
        (tmp_path / f"step-{step:08}").mkdir()
    monkeypatch.setattr(Path, "rename", failing(Path.rename, errno.EIO, on="step-00000001"))
    assert len(prune(tmp_path, newest=4, keep=1)) == 1
    assert checkpoint_steps(tmp_path) == [1, 4], "the others are deleted nevertheless"
    monkeypatch.undo()
    assert not prune(tmp_path, newest=4, keep=1)
    assert checkpoint_steps(tmp_path) == [4]


def test_a_folder_is_made_with_those_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert set(synced) >= {str(tmp_path), str(tmp_path / "a")}
    fsync(tmp_path)


def test_the_first_file_that_a_folder_cannot_be_copied_for_is_named(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "nothing").symlink_to(tmp_path / "none")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert error_text(caught.value) == f"{tmp_path / 'from' / 'nothing'}: No such file or directory"

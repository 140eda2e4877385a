"""A copy of a checkpoint is whole and right, or no checkpoint: at any URL, at whichever call it fails."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardlaunch import UserError
from shardlaunch.checkpoints.copying import copy_in, copy_out, steps_at
from shardlaunch.checkpoints.names import MANIFEST
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.verifying import verify
from tests.unit.checkpoints.saved import flip, save_step, weights_file

STEP = "step-00000005"


class FailingFileSystem(MemoryFileSystem):
    """A file system in memory that fails at one of its calls."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls_left = -1
    loses_bytes = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))
        return stripped

    def _count(self) -> None:
        type(self).calls_left -= 1
        if type(self).calls_left == 0:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().ls(*args, **kwargs)

    def info(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().info(*args, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._count()
        folder = path.rpartition("/")[0]
        assert mode == "rb" or f"{folder}/{MANIFEST}" not in self.store, "written below a manifest"
        file = super()._open(path, mode, **kwargs)
        if mode == "rb":
            return CountedReads(file.getvalue(), self._count)
        write = file.write
        file.write = lambda data: (self._count(), write(data[:-1] if self.loses_bytes else data))[1]
        return file


class CountedReads(io.BytesIO):
    """A file that calls `count` before it is read."""

    def __init__(self, data: bytes, count: Callable[[], None]) -> None:
        super().__init__(data)
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().read(size)


@pytest.fixture
def place() -> Iterator[str]:
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    for file_system in (FailingFileSystem, MemoryFileSystem):
        file_system.store.clear()
        file_system.pseudo_dirs[:] = [""]
    FailingFileSystem.calls_left = -1
    yield "failing://bucket/run"
    FailingFileSystem.store.clear()


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _save_with_folder(checkpoints_dir: Path) -> Path:
    """Save a checkpoint of step 5 that has a file in a folder of its own."""
    return save_step(checkpoints_dir, 5, files={"1_Pooling/config.json": "{}"})


def test_a_copy_there_and_back_is_the_same(tmp_path: Path) -> None:
    step_dir = _save_with_folder(tmp_path / "a")
    for place in ("memory://there", f"file://{tmp_path}/there", str(tmp_path / "elsewhere")):
        url = f"{place}/{STEP}"
        copied = copy_out(step_dir, url)
        assert (copied.step, copied.num_skipped) == (5, 0)
        assert copied.num_bytes == sum(len(data) for name, data in _contents(step_dir).items() if name != MANIFEST)
        assert steps_at(place) == [5]
        again = copy_out(step_dir, url)
        assert (again.num_skipped, again.num_bytes) == (again.num_files, 0)
        back = tmp_path / f"back-{place[:4].strip('/')}" / STEP
        copy_in(url, back)
        assert _contents(back) == _contents(step_dir)
        assert [path.name for path in back.parent.iterdir()] == [STEP]


def test_only_what_is_wrong_is_copied_again(tmp_path: Path) -> None:
    step_dir = _save_with_folder(tmp_path / "a")
    copy = tmp_path / "b" / STEP
    copy_out(step_dir, str(copy))
    for damage in (flip, Path.unlink, lambda path: os.truncate(path, 10)):
        damage(weights_file(copy))
        copied = copy_out(step_dir, str(copy))
        assert copied.num_files - copied.num_skipped == 1
        assert _contents(copy) == _contents(step_dir)
    (copy / MANIFEST).unlink()
    assert steps_at(str(copy.parent)) == []
    assert copy_out(step_dir, str(copy)).num_bytes == 0
    assert open_checkpoint(copy, peers=Peers()).step == 5


def _failure(work: Callable[[], object]) -> str:
    """Return the message of the UserError that `work` raises, empty if it raises none."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def test_a_copy_out_that_fails_at_any_call_is_no_checkpoint_and_is_completed(tmp_path: Path, place: str) -> None:
    step_dir, url = _save_with_folder(tmp_path), f"{place}/{STEP}"
    num_failed = 0
    for call in range(1, 1000):
        FailingFileSystem.store.clear()
        FailingFileSystem.calls_left = call
        failure = _failure(lambda: copy_out(step_dir, url, num_threads=1))
        if FailingFileSystem.calls_left > 0:
            break
        FailingFileSystem.calls_left = -1
        if failure:  # else it failed where it looked for what is there already
            num_failed += 1
            assert "Connection reset" in failure
            for step in steps_at(place):  # the manifest was written, and then could not be read back
                copy_in(f"{place}/step-{step:08d}", tmp_path / f"{call}" / STEP)
            copy_out(step_dir, url)
        there = {
            name.partition(f"{STEP}/")[2]: bytes(file.getvalue()) for name, file in FailingFileSystem.store.items()
        }
        assert there == _contents(step_dir)
    assert num_failed > 20


def test_what_does_not_read_back_is_no_copy(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingFileSystem, "loses_bytes", True)
    with pytest.raises(UserError, match="does not read back as it was written"):
        copy_out(_save_with_folder(tmp_path), f"{place}/{STEP}")
    assert steps_at(place) == []


def test_a_damaged_copy_is_no_checkpoint_while_it_is_written_anew(tmp_path: Path, place: str) -> None:
    step_dir, url = save_step(tmp_path, 5), f"{place}/{STEP}"
    copy_out(step_dir, url)
    name = next(name for name in FailingFileSystem.store if name.endswith(".safetensors"))
    FailingFileSystem.store[name].write(b"X")
    assert copy_out(step_dir, url).num_skipped == 5
    assert copy_out(step_dir, url).num_skipped == 6


def test_a_copy_in_that_fails_at_any_call_leaves_what_the_next_one_uses(tmp_path: Path, place: str) -> None:
    step_dir, url = _save_with_folder(tmp_path / "a"), f"{place}/{STEP}"
    copy_out(step_dir, url)
    num_kept = 0
    for call in range(1, 1000):
        target = tmp_path / f"{call}" / STEP
        FailingFileSystem.calls_left = call
        failure = _failure(lambda: copy_in(url, target, num_threads=1))  # noqa: B023 - called at once
        if FailingFileSystem.calls_left > 0:
            break
        FailingFileSystem.calls_left = -1
        assert "Connection reset" in failure
        assert not target.exists()
        assert ("What is copied stays" in failure) == any(target.parent.glob(".staging-*"))
        num_kept += copy_in(url, target).num_skipped > 0
        assert _contents(target) == _contents(step_dir)
        assert [path.name for path in target.parent.iterdir()] == [STEP]
    assert num_kept > 5


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    step_dir = _save_with_folder(tmp_path / "a")
    copy_out(step_dir, f"{place}/{STEP}")
    fsync, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    for at in range(1, 100):
        calls, target = 0, tmp_path / f"{at}" / STEP
        failure = _failure(lambda: copy_in(f"{place}/{STEP}", target, num_threads=1))  # noqa: B023 - called at once
        if calls < at:
            break
        assert "No space left on device" in failure
        # The last fsync is that of the folder, after the rename.
        assert [path.name for path in target.parent.iterdir()] in ([], [STEP])
    assert at > len(_contents(step_dir))
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage)
    with pytest.raises(UserError, match=r"0\.0 MB are free, but 0\.0 MB are needed"):
        copy_in(f"{place}/{STEP}", tmp_path / "full" / STEP)
    assert list((tmp_path / "full").iterdir()) == []


class _Usage:
    free = 10


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("a/step-00000005", "is the source of the copy"),
        ("a/step-00000005/x", "is the source of the copy, or in it"),
        ("link/step-00000005", "is the source of the copy"),
        ("a", "exists and holds something else"),
        ("b/step-00000006", "name it step-00000005"),
        ("other", "holds another checkpoint .of step 6"),
        ("file", "Not a directory"),
    ],
)
def test_targets_that_are_refused_stay_as_they_are(target: str, complaint: str, tmp_path: Path) -> None:
    step_dir = save_step(tmp_path / "a", 5)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "file").write_text("")
    save_step(tmp_path / "c", 6).rename(tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=complaint):
        copy_out(step_dir, str(tmp_path / target))
    assert [path for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "b"] == before


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("s4://bucket/x", "s4://bucket/x: cannot be used: Protocol not known"),
        ("file://relative", "absolute path"),
        ("ftp://me:secret@127.0.0.1:1/x", r"^ftp://\*\*\*@127.0.0.1:1/x: cannot be used"),
        ("/proc/none/x", "/proc/none"),
    ],
)
def test_urls_that_cannot_be_used(url: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        copy_out(save_step(tmp_path, 5), url)
    assert "secret" not in str(caught.value)


def test_a_damaged_source_is_not_copied(tmp_path: Path) -> None:
    step_dir = save_step(tmp_path / "a", 5)
    good = weights_file(step_dir).read_bytes()
    flip(weights_file(step_dir))
    with pytest.raises(UserError, match=r"model-00001-of-00001.safetensors: the file is damaged"):
        copy_out(step_dir, str(tmp_path / "b" / STEP))
    assert list((tmp_path / "b").iterdir()) == []
    weights_file(step_dir).write_bytes(good[:-1])
    with pytest.raises(UserError, match="bytes in the manifest"):
        copy_out(step_dir, "memory://half")
    weights_file(step_dir).write_bytes(good)
    weights_file(step_dir).rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such file"):
        copy_out(step_dir, "memory://half")
    flip(step_dir / MANIFEST)
    with pytest.raises(UserError, match=r"manifest"):
        copy_out(step_dir, "memory://half")


def test_a_source_that_its_run_deletes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_dir = save_step(tmp_path / "a", 5)
    monkeypatch.setattr(
        "shardlaunch.checkpoints.copying._check_sizes", lambda *_: step_dir.rename(tmp_path / "a" / ".trash")
    )
    with pytest.raises(UserError, match="was deleted while it was copied"):
        copy_out(step_dir, str(tmp_path / "b" / STEP))


def test_what_the_manifest_does_not_list_is_named(tmp_path: Path) -> None:
    step_dir = _save_with_folder(tmp_path / "a")
    for name in ("notes.txt", "1_Pooling/notes.txt"):
        (step_dir / name).write_text("mine")
    (step_dir / "photos/old").mkdir(parents=True)
    unlisted = ("1_Pooling/notes.txt", "notes.txt", "photos")
    assert copy_out(step_dir, str(tmp_path / "b" / STEP)).unlisted == unlisted
    assert verify(step_dir).unlisted == unlisted
    assert _contents(tmp_path / "b" / STEP).keys() == _contents(step_dir).keys() - set(unlisted)

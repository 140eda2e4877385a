"""Folders, file systems, locks and room: real folders, made-up mounts."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from sys import executable

import pytest

from shardlaunch.launcher.commands.doctor import disk
from shardlaunch.launcher.commands.doctor.disk import Mount
from tests.unit.launcher.commands.doctor.levels import fine, only, said


def on(kind: str, *options: str) -> list[Mount]:
    """Return mounts of which the last one holds everything."""
    return [Mount(point="/", kind="ext4"), Mount(point="/", kind=kind, options=frozenset(options))]


@pytest.mark.parametrize(
    ("kind", "level", "part"),
    [
        ("tmpfs", "note", "gone after a reboot"),
        ("overlay", "note", "gone with the container"),
        ("nfs4", "note", "on a network (nfs4)"),
        ("fuse.s3fs", "problem", "half a checkpoint"),
    ],
)
def test_file_systems(kind: str, level: str, part: str, tmp_path: Path) -> None:
    only(disk.check_folder("runs in", tmp_path, on(kind)), level, part)


def test_a_folder_that_is_fine_or_not_there_yet(tmp_path: Path) -> None:
    fine(disk.check_folder("runs in", tmp_path / "a" / "b", on("ext4")))
    assert os.listdir(tmp_path) == []  # nothing is left, nothing is made


def test_a_folder_of_this_machine_for_several(tmp_path: Path) -> None:
    only(disk.check_folder("runs in", tmp_path, on("xfs"), num_machines=2), "note", "2 are to share the folder")
    assert "are to share" not in said(disk.check_folder("runs in", tmp_path, on("nfs"), num_machines=2), "note")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    only(disk.check_folder("runs in", tmp_path / "out" / "run", on("ext4")), "problem", "is a file, not a folder")


def test_a_folder_that_cannot_be_written() -> None:
    only(disk.check_folder("runs in", Path("/proc/none"), on("ext4")), "problem", "cannot be written")


def test_no_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(os.statvfs(tmp_path))
    found[5:8] = 100, 0, 0
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(found))
    only(disk.check_folder("runs in", tmp_path, on("ext4")), "problem", "no files are left (inodes)")


def test_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine(disk.check_temp(str(tmp_path)[:70], "", on("ext4")) if len(str(tmp_path)) < 70 else [])
    findings = disk.check_temp("/tmp", str(tmp_path / "gone"), on("ext4"))
    assert "is no folder that can be written, and /tmp is used" in said(findings, "problem")
    long = tmp_path / ("n" * 90)
    long.mkdir()
    assert "AF_UNIX path too long" in said(disk.check_temp(str(long), str(long), on("ext4")), "problem")
    assert "mounted noexec" in said(disk.check_temp("/tmp", "", on("ext4", "rw", "noexec")), "note")
    monkeypatch.setattr(disk, "LITTLE_TEMP_BYTES", 2**60)
    assert "free for temporary files" in said(disk.check_temp("/tmp", "/tmp", on("ext4")), "problem")


def test_writing_and_locks(tmp_path: Path) -> None:
    ticks = iter([0.0, 0.01])
    findings, figures = disk.check_writing(tmp_path / "new", clock=lambda: next(ticks), most_bytes=disk.BLOCK)
    fine(findings)
    assert round(figures["write_bytes_per_s"]) == disk.BLOCK * 100
    assert "locks hold" in said(findings, "ok")
    assert os.listdir(tmp_path) == []


def test_a_slow_disk_and_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1000, 100))
    findings, _ = disk.check_writing(tmp_path, clock=lambda: next(ticks), most_bytes=2 * disk.BLOCK)
    only(findings, "note", "slow, and each save waits")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    only(disk.check_writing(tmp_path, most_bytes=disk.BLOCK)[0], "problem", "writing is full")
    assert os.listdir(tmp_path) == []


def test_locks_that_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine(disk.check_lock(tmp_path))
    monkeypatch.setattr(fcntl, "lockf", lambda *args: None)  # in this process: the other one is given the lock
    only(disk.check_lock(tmp_path), "problem", "a lock is given to two processes")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    only(disk.check_lock(tmp_path), "note", "cannot be locked: No locks available")


@pytest.fixture
def used(tmp_path: Path) -> Iterator[Path]:
    """Return an output folder that another process has locked."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
    with Popen([executable, "-S", "-c", code, str(tmp_path / ".lock")], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield tmp_path
        process.communicate(timeout=10)


def test_an_output_folder_in_use(used: Path) -> None:
    only(disk.check_use(used), "problem", "a run is using this folder")


def test_what_an_output_folder_holds(tmp_path: Path) -> None:
    assert "does not exist yet" in said(disk.check_use(tmp_path / "new"), "ok")
    (tmp_path / "empty").mkdir()
    assert disk.check_use(tmp_path / "empty") == []
    step_dir = tmp_path / "checkpoints" / "step-00000004"
    step_dir.mkdir(parents=True)
    (step_dir / "model.safetensors").write_bytes(b"x" * 100)
    fine(disk.check_use(tmp_path))
    (tmp_path / "checkpoints" / ".staging-00000006").mkdir()
    findings = disk.check_use(tmp_path)
    assert "resumes from step-00000004" in said(findings, "ok")
    only(findings, "note", "1 folders of saves that did not end")
    assert (disk.size_of_newest(tmp_path), disk.size_of_newest(tmp_path / "new")) == (100, 0)


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3500}))

    def check(num_bytes: int, keep: int = 2) -> list[disk.Finding]:
        return disk.check_room(tmp_path / "new", num_bytes=num_bytes, keep=keep, save_on_best=True)

    fine(check(800))
    only(check(1000), "problem", "4 checkpoints of about 1.0 kB are there at the same time")
    only(check(4000), "problem", "one checkpoint takes about 4.0 kB")
    only(check(1000, keep=0), "note", "room for about 3 checkpoints")


def test_mounts() -> None:
    text = (
        "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "40 27 0:40 / /mnt/my\\040disk rw,nosuid - nfs4 server:/x rw,vers=4\n"
        "41 27 0:41 / /mnt rw,noexec - tmpfs tmpfs rw\nno mount\n"
    )
    mounts = disk.mounts_of(text)
    kinds = {
        path: found.kind
        for path in ("/x", "/mnt/a", "/mnt/my disk/b", "/mntx")
        if (found := disk.mount_of(Path(path), mounts))
    }
    assert kinds == {"/x": "ext4", "/mnt/a": "tmpfs", "/mnt/my disk/b": "nfs4", "/mntx": "ext4"}
    assert "noexec" in mounts[2].options

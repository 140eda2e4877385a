"""Disk: what a run can do in its output folder, in the caches and in the folder for temporary files."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from shardlaunch.checkpoints.names import CHECKPOINTS
from shardlaunch.checkpoints.run_lock import LOCK, locked
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.output import size
from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem

WRITING_S = 1.5
MOST_WRITTEN = 256 * 2**20
BLOCK = 8 * 2**20
SLOW_BYTES_PER_S = 20e6
LITTLE_TEMP_BYTES = 64 * 2**20
MOST_SOCKET_PATH = 107 - len("/pymp-12345678/listener-12345678")  # Linux's longest name of a socket in this folder
_NETWORKS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.sshfs",
    "fuse.glusterfs",
)
_MEANINGS = {
    "tmpfs": (note, "in memory: it counts as memory, and is gone after a reboot", "choose a folder on a disk"),
    "ramfs": (note, "in memory: it counts as memory, and is gone after a reboot", "choose a folder on a disk"),
    "overlay": (note, "a container's own layer: gone with the container", "choose a mounted volume"),
}
_LOCAL = ("ext4", "ext3", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs")
_OF_OBJECTS = ("fuse.s3fs", "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.mountpoint-s3", "fuse.blobfuse2")
# Take the lock of a file, as a second run would: 1 if it is given though it is held.
_SECOND = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(0)
sys.exit(1)
"""


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A mounted file system."""

    point: str
    kind: str
    options: frozenset[str] = frozenset()


def check_folder(name: str, path: Path, mounts: list[Mount], *, num_machines: int = 1) -> list[Finding]:
    """Return what a folder's file system means, and whether it can be written. `name` is what it is for.

    `num_machines` are those that must share the folder.
    """
    place, where = existing(path), f"{name} {path}"
    if not place.is_dir():
        return [problem(f"{where}: {place} is a file, not a folder", "choose another folder")]
    mount = mount_of(place, mounts)
    kind = f", {mount.kind}" if mount else ""
    findings = []
    try:
        with probe_folder(place):
            found = os.statvfs(place)
            free = shutil.disk_usage(place).free
    except OSError as error:
        return [problem(f"{where}: cannot be written: {error.strerror}", "choose a folder that you may write")]
    if found.f_files and not found.f_favail:
        findings.append(
            problem(f"{where}: no files are left (inodes), whatever room there is", "delete files, or choose another")
        )
    if mount and mount.kind in _OF_OBJECTS:
        findings.append(
            problem(
                f"{where}: {mount.kind}, objects shown as files: no locks, and renaming is a copy, so that a crash may "
                f"leave half a checkpoint",
                "choose a disk for it, and copy checkpoints with --save-to URL",
            )
        )
    elif mount and mount.kind in _MEANINGS:
        level, means, advice = _MEANINGS[mount.kind]
        findings.append(level(f"{where}: {size(free)} free, {means} ({mount.kind})", advice))
    elif mount and mount.kind in _NETWORKS:
        findings.append(
            note(f"{where}: {size(free)} free, on a network ({mount.kind}): files show late on other hosts")
        )
    else:
        findings.append(ok(f"{where}: {size(free)} free{kind}"))
    if num_machines > 1 and mount and mount.kind in _LOCAL:
        findings.append(
            note(
                f"{where}: {mount.kind} is a file system of this machine, and {num_machines} are to share the folder: "
                f"a run is refused where they do not",
                "choose a folder that all machines have mounted",
            )
        )
    return findings


def check_temp(path: str, wanted: str, mounts: list[Mount]) -> list[Finding]:
    """Return whether the folder for temporary files is of use. `wanted` is TMPDIR, empty if unset."""
    findings = []
    if wanted and os.path.realpath(wanted) != os.path.realpath(path):
        findings.append(
            problem(
                f"TMPDIR={wanted}: is no folder that can be written, and {path} is used", "create it, or unset TMPDIR"
            )
        )
    findings += check_folder("temporary files in", Path(path), mounts)
    if len(path) > MOST_SOCKET_PATH:
        findings.append(
            problem(
                f"{path}: its {len(path)} characters are too many for the sockets of loading workers "
                f'("AF_UNIX path too long")',
                "set TMPDIR to a shorter path",
            )
        )
    with suppress(OSError):
        free = shutil.disk_usage(path).free
        if free < LITTLE_TEMP_BYTES:
            findings.append(
                problem(
                    f"{path}: only {size(free)} free for temporary files", "make room, or set TMPDIR to another folder"
                )
            )
    mount = mount_of(Path(path), mounts)
    if mount and "noexec" in mount.options:
        findings.append(
            note(f"{path} is mounted noexec: what --compile or DeepSpeed compile there cannot be loaded", "set TMPDIR")
        )
    return findings


def check_use(output_dir: Path) -> list[Finding]:
    """Return whether a run uses the output folder now, and what a new start does with what is there."""
    from shardlaunch.checkpoints.finding import Run

    if not output_dir.is_dir():
        return [ok(f"{output_dir} does not exist yet: a new run")]
    try:
        with locked(output_dir) if (output_dir / LOCK).exists() else nullcontext():
            run = Run(path=output_dir, checkpoints_dir=output_dir / CHECKPOINTS)
            steps, leftovers = run.step_dirs(), run.leftovers()
    except UserError as error:
        return [problem(str(error), "or give the new run another --output-dir")]
    except OSError as error:
        return [problem(f"{error.filename}: cannot be read: {error.strerror}", "choose another folder")]
    findings = []
    if steps:
        findings.append(
            ok(f"{output_dir} has {len(steps)} checkpoints: the same command resumes from {steps[-1].name}")
        )
    if leftovers:
        findings.append(
            note(f"{output_dir}: {len(leftovers)} folders of saves that did not end; the next start deletes them")
        )
    return findings


def size_of_newest(output_dir: Path) -> int:
    """Return the bytes of a run's newest checkpoint, 0 if there is none."""
    from shardlaunch.checkpoints.finding import Run

    try:
        steps = Run(path=output_dir, checkpoints_dir=output_dir / CHECKPOINTS).step_dirs()
        return sum(one.stat().st_size for one in steps[-1].iterdir()) if steps else 0
    except (OSError, UserError):
        return 0


def check_writing(
    path: Path, *, clock: Callable[[], float] = time.monotonic, most_bytes: int = MOST_WRITTEN
) -> tuple[list[Finding], dict[str, float]]:
    """Write, sync and rename in a folder for a second or two; return how fast, and whether locks hold there."""
    findings = []
    place = existing(path)
    try:
        with probe_folder(place) as folder:
            most = min(most_bytes, shutil.disk_usage(folder).free // 4)
            speed, num_bytes = _measure(folder / "data", most, clock)
            os.rename(folder / "data", folder / "renamed")
            findings += check_lock(folder)
    except OSError as error:
        what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"fails: {error.strerror}"
        return [problem(f"{place}: writing {what}", "make room, or choose another folder")], {}
    if not num_bytes:
        return findings, {}
    text = f"{place}: writes {size(int(speed))}/s, synced (measured over {size(num_bytes)})"
    if speed < SLOW_BYTES_PER_S:
        findings.insert(0, note(f"{text}: slow, and each save waits for it", "save less often: --save-every"))
    else:
        findings.insert(0, ok(text))
    return findings, {"write_bytes_per_s": speed}


def _measure(path: Path, most: int, clock: Callable[[], float]) -> tuple[float, int]:
    """Return bytes per second, and how many were written."""
    block, written = os.urandom(BLOCK), 0
    began = clock()
    with open(path, "wb", buffering=0) as file:
        while written + BLOCK <= most and (not written or clock() - began < WRITING_S):
            file.write(block)
            os.fsync(file.fileno())
            written += BLOCK
    return written / max(1e-6, clock() - began), written


def check_lock(folder: Path) -> list[Finding]:
    """Return whether a second process is refused the lock that this one holds."""
    path = folder / LOCK
    try:
        with locked(folder):
            command = [sys.executable, "-S", "-E", "-c", _SECOND, str(path)]
            is_given = subprocess.run(command, capture_output=True, timeout=10).returncode
    except UserError as error:
        return [
            note(
                f"{error}: nothing notices if a second run uses this folder at the same time",
                "mount it with locks (NFS: without nolock), or see to it that none does",
            )
        ]
    except subprocess.TimeoutExpired:
        return [note(f"{path}: another process waits for the lock instead of being refused", "see the mount's options")]
    if is_given:
        return [
            problem(
                f"{folder.parent}: a lock is given to two processes: two runs may use one folder at the same time",
                "choose another file system for --output-dir",
            )
        ]
    return [ok("locks hold, between processes of this machine")]


def check_room(output_dir: Path, *, num_bytes: int, keep: int, save_on_best: bool) -> list[Finding]:
    """Return whether there is room for the checkpoints that are there at the same time. `num_bytes`: of one."""
    free = shutil.disk_usage(existing(output_dir)).free
    if free < num_bytes:
        return [
            problem(
                f"{size(free)} are free; one checkpoint takes about {size(num_bytes)}",
                "make room, or choose another folder",
            )
        ]
    count = keep + 1 + save_on_best
    if keep and free < count * num_bytes:
        return [
            problem(
                f"{size(free)} are free; {count} checkpoints of about {size(num_bytes)} are there at the same time "
                f"(--keep {keep}, one being written{', the best' if save_on_best else ''})",
                "make room, or lower --keep",
            )
        ]
    if not keep:
        return [
            note(
                f"--keep 0 deletes none: there is room for about {free // num_bytes} checkpoints of {size(num_bytes)}",
                "set --keep",
            )
        ]
    return [ok(f"room for {count} checkpoints of about {size(num_bytes)}")]


def existing(path: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


@contextmanager
def probe_folder(place: Path) -> Iterator[Path]:
    """Give a new folder in another one, and remove it at the end. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix=".shardlaunch-doctor-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mounts_of(text: str) -> list[Mount]:
    """Return the mounts that a text such as /proc/self/mountinfo lists."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) > 5 and right:
            point = fields[4].encode().decode("unicode_escape") if "\\" in fields[4] else fields[4]
            mounts.append(Mount(point=point, kind=right.split()[0], options=frozenset(fields[5].split(","))))
    return mounts


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """Return the mount that a path is on: the last one of the longest name."""
    real = os.path.realpath(path)
    on = [one for one in mounts if one.point == "/" or real == one.point or real.startswith(f"{one.point}/")]
    return max(enumerate(on), key=lambda pair: (len(pair[1].point), pair[0]))[1] if on else None

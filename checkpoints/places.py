"""Folders that checkpoints are copied from and to: local ones, and those at any URL that fsspec knows. No torch."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardlaunch.checkpoints.digests import CRC64, DigestingFile, FileRecord, digest_of_kind
from shardlaunch.checkpoints.files import fsync, is_gone
from shardlaunch.checkpoints.names import MANIFEST, step_of_dir_name
from shardlaunch.checkpoints.records import MOST_BYTES, DamagedRecord, open_regular, read_bytes, regular_size
from shardlaunch.errors import UserError

CHUNK_BYTES = 4 << 20
_PASSWORD = re.compile(r"(?<=://)[^/@]+@")
_LOCAL = ("file://", "local://")


class Place(Protocol):
    """A folder of files, which may lie in folders in it. Every method raises UserError that names what failed."""

    @property
    def shown(self) -> str:
        """Return the place as messages show it, without a password."""

    def child(self, name: str) -> "Place":
        """Return a folder in this one."""

    def names(self) -> list[str]:
        """Return the names of what is in the folder; none where there is no folder."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None if there is none."""

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the content of a file."""

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""

    def write(self, name: str, chunks: Iterator[memoryview], *, kind: str = CRC64) -> FileRecord:
        """Write a file, over one that is there, and return size and digest, of a kind, of what was written."""

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it, if there is one."""

    def make(self) -> None:
        """Create the folder, where it is none yet and the file system has folders."""


def place_at(url: str | Path) -> Place:
    """Return the folder at a local path or at a URL. Raises UserError for a URL that cannot be used here."""
    text = os.fspath(url)
    prefix = next((prefix for prefix in _LOCAL if text.startswith(prefix)), "")
    if prefix or "://" not in text:
        path = Path(text.removeprefix(prefix))
        if prefix and not path.is_absolute():
            raise UserError(f"{text}: a {prefix} URL has an absolute path, as in {prefix}/data/runs")
        try:
            return LocalPlace(path.expanduser())
        except RuntimeError as error:
            raise UserError(f"{text}: {error}") from error
    from fsspec.core import url_to_fs

    shown = without_password(text)
    try:
        file_system, path_there = url_to_fs(text)
    except Exception as error:  # of a missing package, an unknown protocol, missing credentials: each has its own
        raise UserError(f"{shown}: cannot be used: {_reason(error)}") from error
    return RemotePlace(file_system=file_system, path=str(path_there).rstrip("/"), shown=shown.rstrip("/"))


def join(url: str | Path, name: str) -> str:
    """Return the URL or path of a folder in another one."""
    return f"{os.fspath(url).rstrip('/')}/{name}"


def without_password(url: str) -> str:
    """Return a URL without the user and the password that may stand in it."""
    return _PASSWORD.sub("***@", url)


def digest_at(place: Place, name: str, *, kind: str, check: Callable[[], None] = lambda: None) -> FileRecord:
    """Read a file and return its size and digest of a kind. `check` is called with each chunk, to stop by raising."""
    digest, num_bytes = digest_of_kind(kind), 0
    for chunk in place.chunks(name):
        check()
        digest.update(chunk)
        num_bytes += len(chunk)
    return FileRecord(num_bytes=num_bytes, digest=digest.hexdigest(), kind=kind)


def committed_steps(place: Place) -> list[int]:
    """Return the steps of which a folder holds a checkpoint with a manifest, ascending."""
    found = ((step_of_dir_name(name), name) for name in place.names())
    return sorted(step for step, name in found if step is not None and place.child(name).size(MANIFEST) is not None)


def entries(place: Place, listed: Iterable[str]) -> list[str]:
    """Return the names of what is in a folder, and in those folders in it that have `listed` files: FOLDER/NAME."""
    folders = {name.rpartition("/")[0] for name in listed}
    return [
        entry
        for name in place.names()
        for entry in ([f"{name}/{inner}" for inner in place.child(name).names()] if name in folders else [name])
    ]


@dataclass(frozen=True)
class LocalPlace:
    """A folder of this machine. Only regular files are opened."""

    path: Path

    @property
    def shown(self) -> str:
        return str(self.path)

    def child(self, name: str) -> "LocalPlace":
        return LocalPlace(self.path / name)

    def names(self) -> list[str]:
        with _failures_named(self.shown):
            try:
                return sorted(os.listdir(self.path))
            except FileNotFoundError:
                return []

    def size(self, name: str) -> int | None:
        path = self.path / name
        return None if is_gone(path) else regular_size(path)

    def chunks(self, name: str) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with open_regular(self.path / name) as file, _failures_named(str(self.path / name)):
            num_left = os.fstat(file.fileno()).st_size  # a file that grows has an end too
            while count := file.readinto(buffer[: min(num_left, CHUNK_BYTES)]):
                yield buffer[:count]
                num_left -= count

    def read(self, name: str) -> bytes:
        return read_bytes(self.path / name)

    def write(self, name: str, chunks: Iterator[memoryview], *, kind: str = CRC64) -> FileRecord:
        path = self.path / name
        with _failures_named(str(path)):
            if "/" in name:
                path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            file = DigestingFile(path, kind=kind)
            try:
                for chunk in chunks:
                    file.write(chunk)
                record = file.finish()
            finally:
                file.close()
            if "/" in name:
                fsync(path.parent)
            _forget_pages(path)
        return record

    def remove(self, name: str) -> None:
        path = self.path / name
        with _failures_named(str(path)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def make(self) -> None:
        with _failures_named(self.shown):
            self.path.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, kw_only=True)
class RemotePlace:
    """A folder of a file system of fsspec."""

    file_system: Any
    path: str
    shown: str

    def child(self, name: str) -> "RemotePlace":
        return RemotePlace(file_system=self.file_system, path=f"{self.path}/{name}", shown=f"{self.shown}/{name}")

    def names(self) -> list[str]:
        with _failures_named(self.shown):
            self.file_system.invalidate_cache()
            try:
                found = self.file_system.ls(self.path, detail=False)
            except FileNotFoundError:
                return []
        # An object store may list the folder itself.
        names = {str(one).rstrip("/").rpartition("/")[2] for one in found if str(one).rstrip("/") != self.path}
        return sorted(names)

    def size(self, name: str) -> int | None:
        with _failures_named(f"{self.shown}/{name}"):
            try:
                info = self.file_system.info(f"{self.path}/{name}")
            except FileNotFoundError:
                return None
        if info.get("type") != "file":
            raise DamagedRecord(f"{self.shown}/{name}: is a {info.get('type')}, where a file must be")
        return int(info["size"])

    def chunks(self, name: str) -> Iterator[memoryview]:
        with _failures_named(f"{self.shown}/{name}"), self.file_system.open(f"{self.path}/{name}", "rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield memoryview(data)

    def read(self, name: str) -> bytes:
        size = self.size(name)
        if size is None or size > MOST_BYTES:
            missing = "no such file" if size is None else f"{size:,} bytes, but at most {MOST_BYTES:,} are read"
            raise DamagedRecord(f"{self.shown}/{name}: {missing}")
        return b"".join(bytes(chunk) for chunk in self.chunks(name))

    def write(self, name: str, chunks: Iterator[memoryview], *, kind: str = CRC64) -> FileRecord:
        digest, num_bytes = digest_of_kind(kind), 0
        if "/" in name:
            self.child(name.rpartition("/")[0]).make()
        with _failures_named(f"{self.shown}/{name}"):
            try:
                with self.file_system.open(f"{self.path}/{name}", "wb") as file:
                    for chunk in chunks:
                        digest.update(chunk)
                        num_bytes += len(chunk)
                        file.write(bytes(chunk))  # a file system may keep what it is given until it has enough to send
            except BaseException:
                with suppress(Exception):  # closing has committed what there was
                    self.remove(name)
                raise
            self.file_system.invalidate_cache()
        return FileRecord(num_bytes=num_bytes, digest=digest.hexdigest(), kind=kind)

    def remove(self, name: str) -> None:
        with _failures_named(f"{self.shown}/{name}"), suppress(FileNotFoundError):
            path = f"{self.path}/{name}"
            if self.file_system.isdir(path):
                self.file_system.rm(path, recursive=True)
            else:
                self.file_system.rm_file(path)
            self.file_system.invalidate_cache()

    def make(self) -> None:
        # Object stores have no folders, and their paths no leading slash: their first part is a bucket, which is not
        # created, because a wrong letter would make a new one.
        is_rooted = self.path.startswith("/")
        missing: list[str] = []
        path = self.path
        with _failures_named(self.shown):
            while path.strip("/") and (is_rooted or "/" in path) and not self.file_system.exists(path):
                missing.append(path)
                path = path.rpartition("/")[0]
            for folder in reversed(missing):
                with suppress(FileExistsError, NotImplementedError):
                    self.file_system.mkdir(folder, create_parents=False)


@contextmanager
def _failures_named(where: str) -> Iterator[None]:
    """Raise UserError that begins with `where` for any failure of a file system."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        name = str(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else where
        raise UserError(f"{name}: {error.strerror or _reason(error)}") from error
    except Exception as error:  # the packages behind fsspec have errors of their own
        raise UserError(f"{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return without_password(" ".join(str(error).split())[:300]) or type(error).__name__


def _forget_pages(path: Path) -> None:
    """Drop a durable file from the page cache, so that reading it back reads the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

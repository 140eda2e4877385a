"""What lies at --data: every file is read, skipped and named, or refused."""

import glob
import mimetypes
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Literal

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.options import Options, flag, option
from shardlaunch.launcher.reporting.notes import current

Kind = Literal["csv", "tsv", "json", "jsonl", "parquet", "arrow", "conll", "text", "other"]
KINDS: dict[str, Kind] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
KNOWN = f"{', '.join(KINDS)}, also in {', '.join(COMPRESSIONS)}"
# Prefixes of file and split names of held-out data; the first one found is used.
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
# What lies in folders of data without being data: of systems, of repositories, of tools that write data.
_JUNK = (
    *(".*", "Thumbs.db", "desktop.ini", "__MACOSX", "_SUCCESS"),
    *("README*", "LICEN[CS]E*", "dataset_info.json", "dataset_infos.json"),
)
MOST_FILES = 3  # named in a line of the run's start
GROUP = "group"  # the column of --group-column, as whole numbers


@dataclass(kw_only=True)
class FileOptions(Options):
    """Options of every recipe that reads files."""

    ignore_files: tuple[str, ...] = option((), mark="free", group="data")
    """Files and folders of --data that are not to be read: names or patterns, such as '*.md' or backup."""
    delimiter: str = option("", mark="free", group="data")
    """Delimiter of CSV and TSV files, such as ';' or tab (default: that of the first line)."""
    encoding: str = option("", mark="free", group="data")
    """Encoding of CSV, TSV, JSON and text files, such as cp1252 (default: UTF-8, or what a byte order mark says)."""
    group_column: str = option("", mark="free", group="data")
    """Column of rows that belong together, such as a patient or a film: an automatic split and --folds keep each value
    on one side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == "demo":
            for name in ("ignore_files", "delimiter", "encoding", "group_column"):
                if getattr(self, name):
                    raise UserError(f"{flag(name)}: has no effect with --data demo; remove it")
        if self.encoding:
            try:
                "".encode(self.encoding)
            except LookupError as error:
                raise UserError(
                    f"--encoding {self.encoding}: unknown; try utf-8, utf-16, cp1252, latin-1, shift_jis or gb18030"
                ) from error
        if self.delimiter in ("tab", r"\t"):
            self.delimiter = "\t"
        if len(self.delimiter.encode()) > 1 or self.delimiter in ('"', "\n", "\r"):
            raise UserError(f"--delimiter {self.delimiter}: must be one character, such as ',' or ';', or tab")

    def groups(self) -> dict[str, str]:
        """Return the column of groups by name, to be selected beside others, if there is one."""
        return {GROUP: GROUP} if self.group_column else {}


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file to read: its kind, its compression (None: none), and the split that its name or a folder's names."""

    path: Path
    kind: Kind
    compression: str | None = None
    split: str | None = None


@dataclass
class Listing:
    """The files of --data, each of a known kind or `other`, and the folder that they were found in, if it is one."""

    source: str
    files: list[DataFile] = field(default_factory=list)
    folder: Path | None = None
    skipped: list[str] = field(default_factory=list)
    """Junk and what --ignore-files names, relative to the folder."""


def paths_of(source: str) -> list[Path]:
    """Return the files and folders of --data: one path, or several with blanks between; patterns name all they match.

    Raises UserError for a path that is not there and does not look like a hub id; returns [] for one that does.
    """
    whole = _matches(source)
    if whole:  # a name with blanks, perhaps
        return whole
    try:
        words = shlex.split(source)
    except ValueError:  # a quote without its other half
        words = [source]
    found: list[Path] = []
    for word in words:
        matches = _matches(word)
        if not matches and len(words) == 1 and not _looks_like_a_path(word):
            return []
        if not matches:
            raise UserError(f"--data {source}: no such file or folder{f': {word}' * (len(words) > 1)}")
        found += [match for match in matches if match not in found]
    return found


def _matches(word: str) -> list[Path]:
    """Return the file or folder of a name, else those that it matches as a pattern."""
    path = Path(word).expanduser()
    try:
        return (
            [path] if os.path.lexists(path) else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        )
    except ValueError:  # a null byte
        return []


def _looks_like_a_path(source: str) -> bool:
    """Return whether a source that does not exist looks like a path: a hub id is NAME or OWNER/NAME."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or glob.has_magic(source):
        return True
    return kind_of(PurePath(source))[0] != "other"


def kind_of(path: PurePath) -> tuple[Kind, str | None]:
    """Return a file's kind and compression, by its suffix in any case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes = suffixes[:-1]
    kind = KINDS.get(suffixes[-1], "other") if suffixes else "other"
    return kind, compression if kind != "other" else None


# Media types, by the suffix, whose content is no text to train on even where its bytes can be read as text.
_NO_TEXT = re.compile(
    r"(image|audio|video|font)/(?!svg)|application/"
    r"(pdf|postscript|rtf|zip|gzip|java|msword|octet-stream|vnd\.|wasm|x-(7z|bcpio|cpio|dvi|hdf|netcdf|python-code|tar))"
)


def is_no_text(path: PurePath) -> bool:
    """Return whether a file's suffix is that of documents, media, archives or programs in binary form."""
    media_type, _ = mimetypes.guess_type(path.name, strict=False)
    return bool(media_type and _NO_TEXT.match(media_type))


def split_of(*names: str) -> str | None:
    """Return the split that the first of some names begins with, of those that begin with one."""
    for name in names:
        word = next((word for word in ("train", *HELD_OUT) if name.lower().startswith(word)), None)
        if word is not None:
            return word
    return None


def listed(source: str, paths: Sequence[Path], ignored: Sequence[str] = ()) -> Listing:
    """List all files at some paths, links followed, in the order of their names.

    Well-known junk and files that match a pattern of --ignore-files are left out, and noted for the run's start. Raises
    UserError for links to nothing, for what is no file, and for patterns that match nothing.
    """
    listing = Listing(source, folder=paths[0] if len(paths) == 1 and paths[0].is_dir() else None)
    junk = listing.skipped
    used: set[str] = set()
    seen: set[str] = set()
    for path in paths:
        if path.is_dir():
            found: Iterable[tuple[str, ...]] = _walk(path, (), junk, ignored, used, frozenset())
        else:  # of several files, a pattern may have named junk too
            found = [] if _is_skipped(path.name, path.name, junk, ignored, used, is_junk=len(paths) > 1) else [()]
        for parts in found:
            file = path.joinpath(*parts)
            _require_file(file, source)
            if os.path.abspath(file) in seen:
                raise UserError(f"--data {source}: {file} is given twice; name it once")
            seen.add(os.path.abspath(file))
            kind, compression = kind_of(file)
            split = split_of(*(parts or (path.name,)))
            listing.files.append(DataFile(path=file, kind=kind, compression=compression, split=split))
    unused = [pattern for pattern in ignored if pattern not in used]
    if unused:
        raise UserError(f"--ignore-files {' '.join(unused)}: no file of --data {source} has such a name; remove it")
    if junk:
        current().data.append(f"not read: {some(junk, MOST_FILES)}")
    listing.files.sort(key=lambda file: str(file.path))
    return listing


def _walk(
    root: Path,
    parts: tuple[str, ...],
    junk: list[str],
    ignored: Sequence[str],
    used: set[str],
    above: frozenset[tuple[int, int]],
) -> Iterator[tuple[str, ...]]:
    """Yield the files below a folder as the parts of their paths."""
    folder = root.joinpath(*parts)
    state = os.stat(folder)
    if (state.st_dev, state.st_ino) in above:
        raise UserError(f"--data {root}: {folder} is a link to a folder that it lies in; remove it")
    above |= {(state.st_dev, state.st_ino)}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"--data {root}: {folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        inner = (*parts, entry.name)
        if _is_skipped(entry.name, "/".join(inner), junk, ignored, used):
            continue
        if entry.is_dir():
            yield from _walk(root, inner, junk, ignored, used, above)
        else:
            yield inner


def _is_skipped(
    name: str, relative: str, junk: list[str], ignored: Sequence[str], used: set[str], *, is_junk: bool = True
) -> bool:
    """Return whether a file or folder is junk or meant by a pattern; add it to `junk`, and the patterns to `used`."""
    patterns = {pattern for pattern in ignored if fnmatch(name, pattern) or fnmatch(relative, pattern)}
    used |= patterns
    if patterns or (is_junk and any(fnmatch(name.lower(), pattern.lower()) for pattern in _JUNK)):
        junk.append(relative)
        return True
    return False


def _require_file(path: Path, source: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise UserError(f"--data {source}: {path} is a link to nothing; remove it, or --ignore-files it") from error
    except OSError as error:
        raise UserError(f"--data {source}: {path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"--data {source}: {path} is neither a file nor a folder; remove it, or --ignore-files it")


def refuse_unread(source: str, files: Sequence[DataFile], why: str) -> None:
    """Raise UserError for files that lie there and are not read, if there are any."""
    if files:
        raise UserError(
            f"--data {source}: {some(str(file.path) for file in files)}: {why}. What lies there is read as a whole: "
            f"remove what is no data, or name it with --ignore-files"
        )

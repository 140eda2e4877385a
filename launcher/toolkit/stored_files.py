"""Columns whose cells are files, as images and sounds have them: bytes, or a path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shardlaunch.launcher.reporting.notes import counted, current
from shardlaunch.launcher.toolkit.cache import content_digest


def stored_bytes(stored: Mapping[str, Any] | None) -> bytes:
    """Return the bytes of a stored file. Raises OSError if its path cannot be read, ValueError if there are none."""
    if stored is None or (stored["bytes"] is None and not stored["path"]):
        raise ValueError("it is missing")
    content: bytes = stored["bytes"] or (Path(stored["path"]).read_bytes() if stored["path"] else b"")
    if not content:
        raise ValueError("it is empty")
    return content


def name_of_row(row: int, stored: Mapping[str, Any] | None) -> str:
    """Return what messages call a row: its number, and its path if it has one."""
    return f"row {row} ({stored['path']})" if stored and stored["path"] else f"row {row}"


def content_of_files(split: Any, column: str) -> list[str]:
    """Return a digest of the files that a data set refers to by path, if any."""
    paths = []
    for chunk in split.with_format("arrow", columns=[column])[:][column].chunks:
        paths += [Path(path) for path in chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist() if path]
    # A missing file is reported when it is read.
    return [content_digest(path for path in paths if path.is_file())] if paths else []


def note_conversions(done: np.ndarray, words: Mapping[int, str], *, noun: str, where: str) -> None:
    """Note what was done to the files, as bits that `words` are for, for the start of the run."""
    split = where.rpartition(" of the ")[2]
    for bit, text in words.items():
        count = int(np.count_nonzero(done & bit))
        if count:
            current().remarks.append(f"{counted(count, noun)} of the {split} {text}")

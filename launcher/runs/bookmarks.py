"""Where a resume may begin to read an iterable that has a state: what it kept, compared with the rows that followed."""

import copy
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shardlaunch.checkpoints.records import BookmarkRecord, DamagedRecord, read_record, to_json
from shardlaunch.launcher.runs.identity import digest_value

EVERY_ROWS = 10_000
COMPARED_ROWS = 8


def has_state(rows: Any) -> bool:
    """Return whether an iterable has a state, as datasets' have, and can be copied, so that each start has its own."""
    if not all(callable(getattr(rows, name, None)) for name in ("state_dict", "load_state_dict")):
        return False
    try:
        copy.deepcopy(rows)
    except Exception:  # of whatever it holds
        return False
    return True


@dataclass
class Bookmarks:
    """Bookmarks in a folder of the run, which every process that loads may write: they are the same for all."""

    folder: Path
    _noted: BookmarkRecord | None = field(default=None, init=False)

    def note(self, row: int, num_passes: int, first_of_pass: int, state: Callable[[], Any]) -> None:
        """Note the state of an iterable before a row is read, at every 10,000th, unless it is no JSON."""
        if row % EVERY_ROWS or not row or self._path(row).exists():
            return
        with suppress(TypeError, ValueError):  # json.dumps
            kept = json.loads(json.dumps(state()))
            self._noted = BookmarkRecord(
                row=row, num_passes=num_passes, first_of_pass=first_of_pass, rows=[], state=kept
            )

    def follow(self, row: Any) -> None:
        """Take up a row that has been read, and write the bookmark when it has enough."""
        if self._noted is None:
            return
        self._noted.rows.append(row_digest(row))
        if len(self._noted.rows) == COMPARED_ROWS:
            record, self._noted = self._noted, None
            with suppress(OSError):  # a bookmark only saves time
                self.folder.mkdir(parents=True, exist_ok=True)
                part = self._path(record.row).with_suffix(f".{os.getpid()}.part")
                part.write_bytes(to_json(msgspec.to_builtins(record)))
                part.replace(self._path(record.row))

    def forget(self) -> None:
        """Give up the bookmark that is being made: the reading does not go on from it."""
        self._noted = None

    def before(self, row: int, *, behind: int) -> BookmarkRecord | None:
        """Return the last bookmark whose compared rows are before a row, and itself behind another, None if none is."""
        last = (row - COMPARED_ROWS) // EVERY_ROWS * EVERY_ROWS
        for place in range(last, behind, -EVERY_ROWS):
            with suppress(DamagedRecord):
                found = read_record(self._path(place), BookmarkRecord)
                if found.row == place and len(found.rows) == COMPARED_ROWS:
                    return found
        return None

    def _path(self, row: int) -> Path:
        return self.folder / f"{row:012}.json"


def row_digest(row: Any) -> str:
    """Return a digest of a row's content."""
    digest = xxhash.xxh3_128()
    digest_value(digest, row)
    return digest.hexdigest()

"""What the kinds of shards have in common: a file is a series of blocks, and a block is read as a whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shardlaunch.errors import UserError


class Block(NamedTuple):
    """Consecutive samples of a file that are read at once: where they begin and end in it, and their number.

    `start` and `end` are bytes, row groups or samples, as the format has it.
    """

    start: int
    end: int
    num_samples: int


class Rows(Protocol):
    """The samples of a block, of which each is decoded when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        """Return a sample. Raises ValueError for one that cannot be decoded."""
        ...


class ShardFormat(Protocol):
    """How files of one kind are divided into blocks, and read.

    What cannot be read raises ValueError, which names the sample or member, or an error of the library that reads it.
    """

    kind: str
    version: int
    """Of the blocks that are found, which are kept in the cache."""

    def blocks(self, path: Path) -> Iterator[Block]:
        """Yield the blocks of a file, in order. Raises ValueError if it is not as the first file was."""
        ...

    def read(self, path: Path, block: Block) -> Rows:
        """Return the samples of a block."""
        ...


def require_columns(found: Sequence[str], wanted: Sequence[str] | None, what: str = "column") -> None:
    """Raise ValueError if a wanted column is not among those found."""
    missing = [name for name in wanted or () if name not in found]
    if missing:
        raise ValueError(f"has no {what} {', '.join(map(repr, missing))}; it has {', '.join(map(repr, found))}")


def read_bytes(path: Path, start: int, end: int) -> bytes:
    """Return a range of a file. Raises ValueError if the file ends before it does."""
    with open(path, "rb") as file:
        file.seek(start)
        found = file.read(end - start)
    if len(found) < end - start:
        raise ValueError(f"ends {end - start - len(found):,} bytes too early")
    return found


def unreadable(path: Path, where: str, error: BaseException) -> UserError:
    """Return the message for what cannot be read in a file."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"--data {path}: {where}{text}")

"""Data sets of any size, whose samples are read from shards block by block, in an order that needs few at a time."""

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting.notes import counted, current
from shardlaunch.launcher.toolkit.datasets import files_by_split
from shardlaunch.launcher.toolkit.files import (
    FileOptions,
    Listing,
    listed,
    paths_of,
    refuse_unread,
)
from shardlaunch.launcher.toolkit.shards.formats import Rows, ShardFormat
from shardlaunch.launcher.toolkit.shards.index import Index, index_of, naming, stamp_of
from shardlaunch.launcher.toolkit.shards.json_lines import JsonLinesShards
from shardlaunch.launcher.toolkit.shards.mds import MdsShards, check_index
from shardlaunch.launcher.toolkit.shards.parquet import ParquetShards
from shardlaunch.launcher.toolkit.shards.tar import TarShards
from shardlaunch.launcher.training.block_orders import SHUFFLE_WINDOW, BlockOrder
from shardlaunch.progress import progress

FORMATS: Mapping[str, Callable[[Sequence[str] | None], ShardFormat]] = {
    ".parquet": ParquetShards,
    ".jsonl": JsonLinesShards,
    ".ndjson": JsonLinesShards,
    ".tar": TarShards,
    ".mds": MdsShards,
}
Row = dict[str, Any]
COMPRESSED = (".gz", ".tgz", ".bz2", ".zst", ".xz", ".zstd")
LEAST_BLOCKS = 2.0  # in a window; fewer are warned of


class Shards:
    """A map-style data set of samples in files, which are read block by block and never all at once.

    Samples are dictionaries; `transform` is called with each when it is read. Blocks that were read last are kept in
    memory: those of a window of the shuffled order. Each process that loads keeps its own.
    """

    def __init__(self, index: Index, form: ShardFormat, *, transform: Callable[[Row], Any] | None = None) -> None:
        self._index = index
        self._form = form
        self._transform = transform
        self._starts = np.cumsum(index.sizes) - index.sizes
        self._num_samples = int(index.sizes.sum())
        self._file_starts = {
            int(file): int(self._starts[block]) for block, file in reversed(list(enumerate(index.blocks[:, 0])))
        }
        self._held: OrderedDict[int, Rows] = OrderedDict()
        self._most_held = 0

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> Any:
        if not -self._num_samples <= sample < self._num_samples:
            raise IndexError(sample)
        sample %= self._num_samples
        number = int(self._starts.searchsorted(sample, side="right")) - 1
        file = int(self._index.blocks[number, 0])
        path = self._index.files[file]
        rows = self._block(number)
        where = f"sample {sample - self._file_starts[file]} "
        with naming(path, where):
            row = rows[sample - int(self._starts[number])]
        if self._transform is None:
            return row
        try:
            return self._transform(row)
        except Exception as error:
            error.add_note(f"while the transform had {where}(from 0) of {path}")
            raise

    def _block(self, number: int) -> Rows:
        """Return the rows of a block; read it, and forget those that were not used for longest, if it is not held."""
        rows = self._held.get(number)
        if rows is not None:
            self._held.move_to_end(number)
            return rows
        size = int(self._index.sizes[number])
        held = sum(map(len, self._held.values()))
        while self._held and held + size > self._most_held:
            held -= len(self._held.popitem(last=False)[1])
        rows = self._held[number] = self._read(number)
        return rows

    def _read(self, number: int) -> Rows:
        progress.advance()
        file, block = self._index.block(number)
        path = self._index.files[file]
        first = int(self._starts[number]) - self._file_starts[file]
        where = f"samples {first} to {first + block.num_samples - 1} cannot be read: "
        with naming(path, where):
            self._check_unchanged(file)
            rows = self._form.read(path, block)
        if len(rows) != block.num_samples:
            raise UserError(f"--data {path}: {where}{len(rows)} are there, which were others at the start")
        return rows

    def _check_unchanged(self, file: int) -> None:
        """Raise UserError for a file that is another than at the start of the run."""
        path, stamp = self._index.files[file], self._index.stamps[file]
        state = os.stat(path)
        is_same = (state.st_size, state.st_mtime_ns) == stamp[:2]
        if not is_same and stamp_of(path)._replace(mtime_ns=stamp.mtime_ns) != stamp:
            raise UserError(
                f"--data {path}: changed since the run was started; put back the file as it was, and start again, or "
                f"start a new run"
            )

    has_blocks = True

    @property
    def is_stored(self) -> bool:
        """Whether rows are as they are stored, so that they need not be looked at twice."""
        return self._transform is None

    def fingerprint(self) -> str:
        """Return a digest of the blocks, and of a part of the bytes of each file."""
        return self._index.fingerprint()

    def shuffled_order(self, options: Options) -> BlockOrder:
        """Return an order of the blocks, and of the samples in windows of them; note it for the run's start."""
        order = BlockOrder(self._index.sizes, window=options.shuffle_window or SHUFFLE_WINDOW)
        num_blocks = order.blocks_per_window()
        notes = current()
        if num_blocks < len(self._index.sizes):
            notes.data.append(f"shuffled in windows of about {order.window:,} samples ({num_blocks:.1f} blocks)")
        if num_blocks < min(LEAST_BLOCKS, len(self._index.sizes)):
            notes.warnings.append(
                f"samples are shuffled in windows of {num_blocks:.1f} blocks, so that those of a block stay together: "
                f"choose a --shuffle-window of several times {int(self._index.sizes.max()):,} samples, which are then "
                f"in the memory of each process that loads, or write the data in smaller blocks (row groups, files)"
            )
        return order

    def hold_samples(self, order: Any, span: int) -> None:
        """Keep the blocks in memory that any `span` consecutive positions are in, of an order of blocks."""
        if isinstance(order, BlockOrder):
            self._most_held = order.samples_at_once(span)


def load_shards(
    source: str,
    *,
    columns: Sequence[str] | None = None,
    transform: Callable[[Row], Any] | None = None,
    options: FileOptions | None = None,
) -> dict[str, Shards]:
    """Return the data sets `train` and, if there is such data, `eval`, of files that are read block by block.

    `source` is a file, a folder, several of them or patterns: Parquet, tar archives of members KEY.NAME (WebDataset),
    JSON lines, or MDS. Files whose names, or folders, begin with validation, valid, val, dev, eval or test are the
    evaluation data; all others are training data.

    `columns` names the columns or fields that are read (None: all). `transform(sample)` returns what a sample becomes,
    and may draw from the global random generators. Of `options`, --ignore-files is read. Raises UserError for files
    that cannot be read, or that would not be.
    """
    options = options or FileOptions()
    paths = paths_of(source)
    if not paths:
        raise UserError(f"--data {source}: no such file or folder; shards are read from local files")
    listing = listed(source, paths, options.ignore_files)
    found: dict[str, Shards] = {}
    for word, (suffix, files) in _shards_by_split(listing).items():
        form = FORMATS[suffix](columns)
        index = index_of(files, form, columns)
        found[word] = Shards(index, form, transform=transform)
        kind = f"{form.kind} file{'s' * (len(files) > 1)}"
        current().data.append(
            f"{word}: {counted(len(found[word]), 'sample')} in {counted(len(index.blocks), 'block')} of "
            f"{len(files):,} {kind}"
        )
    if "train" not in found:
        raise UserError(f"--data {source}: no training data; it has {', '.join(found)}")
    held_out = next((name for name in found if name != "train"), None)
    return {"train": found["train"]} if held_out is None else {"train": found["train"], "eval": found[held_out]}


def _shards_by_split(listing: Listing) -> dict[str, tuple[str, list[Path]]]:
    """Return the suffix and the files of each split. Raises UserError for files of no known kind, or of several."""
    is_mds = {file.path.parent for file in listing.files if file.path.suffix == ".mds"}
    indexes = [file for file in listing.files if file.path.name == "index.json" and file.path.parent in is_mds]
    for file in indexes:
        with naming(file.path):
            check_index(file.path)
    files = [file for file in listing.files if file not in indexes]
    if not files:
        raise UserError(f"--data {listing.source}: no files of {', '.join(FORMATS)}")
    unknown = [file for file in files if file.compression or file.path.suffix.lower() not in FORMATS]
    compressed = [file for file in unknown if file.path.suffix.lower() in COMPRESSED]
    refuse_unread(listing.source, compressed, "compressed, so that it cannot be read from the middle; decompress it")
    refuse_unread(listing.source, unknown, f"not of a kind that is read block by block ({', '.join(FORMATS)})")
    named = files_by_split(replace(listing, files=files)) if any(file.split for file in files) else {"train": files}
    found = {}
    for word, members in named.items():
        kinds = {file.path.suffix.lower(): file.path for file in members}
        if len(kinds) > 1:
            raise UserError(
                f"--data {listing.source}: files of several kinds: {', '.join(str(path) for path in kinds.values())}; "
                f"choose those of one, such as --data '{listing.folder or '.'}/*{next(iter(kinds))}'"
            )
        found[word] = next(iter(kinds)), [file.path for file in members]
    return found

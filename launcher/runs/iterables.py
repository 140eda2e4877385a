"""Training data that can only be read in order: samples by their place in the stream, however often it is begun."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
import torch.utils.data._utils.worker as torch_worker
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.order import Order
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.runs.bookmarks import Bookmarks, has_state, row_digest
from shardlaunch.launcher.runs.identity import digest_value
from shardlaunch.launcher.seeding import derive_seed, sample_seeds, seed_generators, seeded
from shardlaunch.launcher.training import orders
from shardlaunch.progress import progress

DIGESTED_ROWS = 64
BOOKMARKS = "bookmarks"  # a folder of a run


def is_stream(dataset: Any) -> bool:
    """Return whether a data set has rows in an order only, and not by number."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return True  # also with a length; and torch gives it a __getitem__ that raises
    has_rows = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return hasattr(dataset, "__iter__") and not has_rows


class Stream:
    """A data set whose sample n is the n-th row of an iterable, as long as a run of --max-steps needs.

    Each process that loads reads the iterable from its start, and passes over what others take: so that any rank can
    begin anywhere. One that has a state goes on at the last bookmark in `folder`, which an earlier start left there.
    When it comes to its end, it begins anew, after `set_epoch` if it has that. The global generators are seeded for
    each row that is read, whoever takes it.
    """

    def __init__(self, rows: Iterable[Any], options: Options, *, folder: Path | None = None) -> None:
        kind = type(rows).__name__
        if iter(rows) is rows:
            raise UserError(
                f"the train data is a {kind}, an iterator that can be read once only, which a resume and other ranks "
                f"cannot: return an object whose __iter__() begins anew, such as an IterableDataset"
            )
        if not options.max_steps:
            raise UserError(
                f"the train data is a {kind}, which has no length: say with --max-steps how long the run is"
            )
        if options.extend_to_steps:
            raise UserError("--extend-to-steps: not with training data that has no length; give more --max-steps")
        self._rows = rows
        self._seed = options.seed
        self._num_samples = options.max_steps * options.global_batch_size
        self._bookmarks: Bookmarks | None = None
        self._forget()
        if folder is not None and has_state(rows):
            # Of another seed or other data, there are others.
            self._bookmarks = Bookmarks(folder / self.fingerprint()[:16])

    def _forget(self) -> None:
        if self._bookmarks is not None:
            self._bookmarks.forget()
        self._iterator: Iterator[Any] | None = None
        self._read_from: Any = None
        self._process = os.getpid()
        self._next = self._num_passes = self._first_of_pass = 0

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> Any:
        # Of a process that was forked, the files are shared with the one that opened them.
        if self._process != os.getpid() or sample < self._next:
            self._forget()
        # An iterable of torch or datasets would leave samples to other workers, which read all of it here.
        torch_worker._worker_info = None
        try:
            self._go_near(sample)
            while self._next < sample:
                self._read()
            return self._read()
        except BaseException:
            self._forget()  # what has raised may not go on where it was
            raise

    def _go_near(self, sample: int) -> None:
        """Go on at the last bookmark before a sample, if it is the right place: the rows from there are compared.

        A shuffle buffer, for one, is no part of the state of datasets: its rows are then read from the start.
        """
        bookmark = self._bookmarks.before(sample, behind=self._next) if self._bookmarks is not None else None
        if bookmark is None:
            return
        self._forget()
        self._next, self._num_passes, self._first_of_pass = bookmark.row, bookmark.num_passes, bookmark.first_of_pass
        self._iterator = self._begun(bookmark.state)
        if any(row_digest(self._read()) != digest for digest in bookmark.rows):
            self._bookmarks = None
            self._forget()

    def _read(self) -> Any:
        """Return the next row of the stream, from its start again if it has come to its end."""
        progress.advance()
        if self._iterator is None:
            self._iterator = self._begun()
        if self._bookmarks is not None:
            self._bookmarks.note(self._next, self._num_passes, self._first_of_pass, self._read_from.state_dict)
        seed_generators(int(sample_seeds(self._seed, 0, np.array([self._next]))[0]))
        try:
            row = next(self._iterator)
        except StopIteration:
            if self._next == self._first_of_pass:
                raise UserError("the train data has no rows") from None
            self._num_passes, self._first_of_pass = self._num_passes + 1, self._next
            self._iterator = None
            return self._read()
        self._next += 1
        if self._bookmarks is not None:
            self._bookmarks.follow(row)
        return row

    def _begun(self, state: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """Return an iterator over the rows from their start, or from a state."""
        # A state stays in what it was loaded into, and would be begun at again.
        self._read_from = copy.deepcopy(self._rows) if self._bookmarks is not None else self._rows
        if hasattr(self._read_from, "set_epoch"):
            self._read_from.set_epoch(self._num_passes)
        if state is not None:
            self._read_from.load_state_dict(state)
        seed_generators(derive_seed(self._seed, "stream", self._num_passes))
        return iter(self._read_from)

    def rows_to_compare(self, count: int) -> list[int]:
        """Return the rows by which a second look, and a fingerprint, know the data: the first ones."""
        return list(range(min(count, self._num_samples)))

    def fingerprint(self) -> str:
        """Return a digest of the first rows. What comes behind them is not looked at."""
        digest = xxhash.xxh3_128(type(self._rows).__name__.encode())
        with seeded(self._seed):
            for row in self.rows_to_compare(DIGESTED_ROWS):
                digest_value(digest, self[row])
        return digest.hexdigest()

    def shuffled_order(self, options: Options) -> Order:
        """Return the order of the stream itself; note for the run's start what that means."""
        if options.shuffle_window:
            raise UserError(
                "--shuffle-window: has no effect on training data that can only be read in order; shuffle it in the "
                "recipe, by a seed (of datasets: shuffle(seed=0, buffer_size=10_000))"
            )
        kept = "behind its last bookmark" if self._bookmarks is not None else "before"
        current().data.append(
            f"train: a {type(self._rows).__name__} without a length, in its own order; each process that loads reads "
            f"all of it, and a resume reads again what came {kept}"
        )
        return orders.sequential(self._num_samples)

    def hold_samples(self, order: Any, span: int) -> None:
        """Refuse an order that would go back, at which the stream would be read from its start."""
        if getattr(order, "name", "") != "sequential" or span > 1:
            raise UserError(
                "the training data can only be read in order: the recipe must have no order() and no lengths() for it"
            )

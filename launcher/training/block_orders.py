"""The order of data that is read block by block: blocks are shuffled, and the samples within windows of blocks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.seeding import derive_seed
from shardlaunch.launcher.training.permutation import Permutation

SHUFFLE_WINDOW = 1 << 14
_VERSION = 1  # change it with the samples of the order


@dataclass(frozen=True, eq=False)
class _Layout:
    """One epoch: its blocks as they come, where each begins, and where each window begins (with the epoch's end)."""

    blocks: np.ndarray
    starts: np.ndarray
    windows: np.ndarray


class BlockOrder:
    """An order that permutes blocks of consecutive samples, and then the samples of each window of blocks.

    A window is a run of the permuted blocks of about `window` samples, of at least one block. Which sample comes when
    is computed from seed, epoch and position; nothing of it is stored. Memory: 40 bytes per block.
    """

    def __init__(self, sizes: Any, *, window: int = SHUFFLE_WINDOW) -> None:
        found = np.asarray(sizes)
        if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu" or (found < 1).any():
            raise UserError(
                f"orders.blockwise(): must be given the number of samples of each block, whole numbers from 1, not "
                f"{found.dtype} of shape {list(found.shape)}"
            )
        if window < 1:
            raise UserError(f"orders.blockwise(): window must be a number of samples from 1, not {window}")
        self.window = window
        self._sizes = found.astype("<i8")
        self._first_samples = np.cumsum(self._sizes) - self._sizes
        self.num_samples = self.num_in_data = int(self._sizes.sum())
        self._laid_out: tuple[tuple[int, int], _Layout] | None = None

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples at positions of an epoch: int64."""
        layout = self._layout(seed, epoch)
        places = np.empty(len(positions), dtype=np.int64)
        in_window = np.searchsorted(layout.windows, positions, side="right") - 1
        for number in np.unique(in_window).tolist():
            here = in_window == number
            first, end = layout.windows[number : number + 2].tolist()
            shuffle = Permutation(end - first, derive_seed(seed, "window", epoch, number))
            places[here] = first + shuffle(positions[here] - first)
        block = np.searchsorted(layout.starts, places, side="right") - 1
        found: np.ndarray = self._first_samples[layout.blocks[block]] + places - layout.starts[block]
        return found

    def samples_at_once(self, span: int) -> int:
        """Return how many samples the blocks have, at most, that any `span` consecutive positions are in."""
        largest = self.window + int(self._sizes.max())  # the last block of a window begins in it
        return largest if span <= 1 else span + 2 * largest

    def blocks_per_window(self) -> float:
        """Return the mean number of blocks that are shuffled together."""
        return len(self._sizes) / (len(self._layout(0, 0).windows) - 1)

    def digest(self) -> str:
        """Return what the order follows from."""
        digest = xxhash.xxh3_64(repr((_VERSION, self.window)).encode())
        digest.update(self._sizes.data)
        return f"blockwise {digest.hexdigest()}"

    def _layout(self, seed: int, epoch: int) -> _Layout:
        if self._laid_out is None or self._laid_out[0] != (seed, epoch):
            count = len(self._sizes)
            blocks = Permutation(count, derive_seed(seed, "blocks", epoch))(np.arange(count))
            ends = np.cumsum(self._sizes[blocks])
            starts = ends - self._sizes[blocks]
            cells = starts // self.window
            begins = np.flatnonzero(np.diff(cells, prepend=-1))
            layout = _Layout(blocks=blocks, starts=starts, windows=np.append(starts[begins], ends[-1]))
            self._laid_out = (seed, epoch), layout
        return self._laid_out[1]


def blockwise(sizes: Any, *, window: int = SHUFFLE_WINDOW) -> BlockOrder:
    """Return an order for data whose samples are read in blocks, as of a file: few blocks are needed at a time.

    `sizes` has the number of samples of each block, in the order of the data. Blocks are shuffled, and then the samples
    of each window of blocks, which has about `window` samples and at least one block. Raises UserError for other sizes.
    """
    return BlockOrder(sizes, window=window)

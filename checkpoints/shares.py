"""Each rank's share of a save: it writes ranges that it holds into the files, at offsets that follow from the names.

Nothing is sent but the digests: a rank knows its share from its own fragments, since each says which replica it is of
equal ones on other ranks. These divide their bytes evenly.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from shardlaunch.checkpoints.digests import WRITE_BACK_BYTES, begin_write_back, crc64nvme, shifted
from shardlaunch.checkpoints.files import naming
from shardlaunch.checkpoints.layout import TensorFile, plan_files
from shardlaunch.checkpoints.state import Fragment, Replica, TensorSpec, checked
from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT

CHUNK_BYTES = 4 << 20  # copied from a device, digested and written at once
_SMALL_BYTES = 1 << 20  # what is smaller is written together with what follows it in the file
ALIGNED_BYTES = 8  # a share ends where an element of any dtype does
_MOST_OPEN = 64


class Piece(NamedTuple):
    """Elements [start, end) of a tensor, the one at `position` in the state, which this rank writes."""

    position: int
    spec: TensorSpec
    start: int
    end: int
    values: torch.Tensor
    """The elements, flat, on any device."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a rank writes of a state, and the files of the whole of it."""

    specs: list[TensorSpec]
    """All tensors of the state."""
    files: list[TensorFile]
    pieces: list[Piece]
    """In the order of the state."""

    @property
    def num_bytes(self) -> int:
        return sum(piece.values.nbytes for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class HostShare(Share):
    """A share whose values lie one after the other in host memory, each where any dtype may begin."""

    memory: torch.Tensor


def share_of(state: Iterable[Fragment], *, rank: int = 0, num_ranks: int = 1) -> Share:
    """Return this rank's share of a state, as views of its fragments where these are contiguous.

    Raises AssertionError for a tensor that is there twice, or a fragment of another size.
    """
    fragments = checked(state)
    specs = [fragment.spec for fragment in fragments]
    return Share(specs=specs, files=plan_files(specs), pieces=own_pieces(fragments, rank=rank, num_ranks=num_ranks))


class Snapshots:
    """Copies of shares in host memory, one after the other in the same place: what is there already costs no time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, share: Share) -> HostShare:
        """Return a copy of a share, in place of the one before."""
        sizes = [piece.values.nbytes for piece in share.pieces]
        begins = [0, *accumulate(-(-size // ALIGNED_BYTES) * ALIGNED_BYTES for size in sizes)]
        is_on_device = any(piece.values.device.type != "cpu" for piece in share.pieces)
        if self._memory.numel() < begins[-1]:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free it first
            self._memory = torch.zeros(begins[-1], dtype=torch.uint8, pin_memory=is_on_device)
        copies = []
        for piece, begin, size in zip(share.pieces, begins, sizes, strict=False):
            values = self._memory[begin : begin + size].view(piece.values.dtype)
            values.copy_(piece.values, non_blocking=True)
            copies.append(piece._replace(values=values))
        if is_on_device:
            torch.cuda.synchronize()
        return HostShare(specs=share.specs, files=share.files, pieces=copies, memory=self._memory[: begins[-1]])


def own_pieces(fragments: Sequence[Fragment], *, rank: int, num_ranks: int) -> list[Piece]:
    """Return what this rank writes of the fragments that it holds, in their order.

    The ranks that hold the same ranges share them out evenly by bytes, over all tensors and sections together.
    """
    groups: dict[Replica, list[int]] = {}
    for index, fragment in enumerate(fragments):
        if fragment.flat_end > fragment.flat_start:
            groups.setdefault(fragment.replica or Replica(rank, num_ranks), []).append(index)
    pieces = []
    for replica, indices in groups.items():
        item_bytes = np.array([BYTES_PER_ELEMENT[fragments[i].spec.dtype] for i in indices])
        num_elements = np.array([fragments[i].flat_end - fragments[i].flat_start for i in indices])
        ends = np.cumsum(num_elements * item_bytes)
        begins = ends - num_elements * item_bytes
        first, last = (
            np.clip((_cut(ends[-1], number, replica.num_replicas) - begins) // item_bytes, 0, num_elements)
            for number in (replica.number, replica.number + 1)
        )
        for i in np.flatnonzero(last > first):
            fragment, begin, end = fragments[indices[i]], int(first[i]), int(last[i])
            values = fragment.tensor.detach().reshape(-1)[begin:end]
            start = fragment.flat_start
            pieces.append(Piece(indices[i], fragment.spec, start + begin, start + end, values))
    return sorted(pieces, key=lambda piece: piece.position)


def _cut(num_bytes: np.int64, number: int, count: int) -> int:
    """Return where the share of a number ends. As Python integers: the product may be larger than 64 bits."""
    cut = int(num_bytes) * number // count
    return cut if number == count else cut // ALIGNED_BYTES * ALIGNED_BYTES


class Written(NamedTuple):
    """What this rank has written of each tensor of the state: its part of the CRC, and the number of elements."""

    crcs: np.ndarray
    num_elements: np.ndarray


def write_share(
    folder: Path, share: Share, *, with_headers: bool, on_chunk: Callable[[], None] = lambda: None
) -> Written:
    """Write a share durably at its places into files that are there. Raises OSError that names the file."""
    crcs = np.zeros(len(share.specs), dtype=np.uint64)
    num_elements = np.zeros(len(share.specs), dtype=np.int64)
    places = {spec.key: (number, offset) for number, file in enumerate(share.files) for spec, offset in file.offsets()}
    pieces_of: dict[int, list[Piece]] = {}
    for piece in share.pieces:
        pieces_of.setdefault(places[piece.spec.key][0], []).append(piece)
    with ExitStack() as stack:
        written: list[_SharedFile] = []
        for number, file in enumerate(share.files):
            if not with_headers and number not in pieces_of:
                continue
            out = stack.enter_context(_SharedFile(folder / file.file_name))
            written.append(out)
            if with_headers:
                out.write(0, memoryview(file.header))
            for piece in pieces_of.get(number, ()):
                spec = piece.spec
                item_bytes = BYTES_PER_ELEMENT[spec.dtype]
                at = places[spec.key][1] + piece.start * item_bytes
                crc = 0
                for chunk in chunks(piece.values):
                    crc = crc64nvme(chunk, crc)
                    out.write(at, chunk)
                    at += len(chunk)
                    on_chunk()
                crcs[piece.position] ^= np.uint64(shifted(crc, (spec.num_elements - piece.end) * item_bytes))
                num_elements[piece.position] += piece.end - piece.start
            out.begin_write_back()
            if len(written) > _MOST_OPEN:
                written.pop(0).finish()
        for out in written:
            out.finish()
    return Written(crcs, num_elements)


def chunks(values: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a flat tensor, copied only where they are not in host memory."""
    for part in values.split(CHUNK_BYTES // values.element_size()):
        yield part.to("cpu").contiguous().view(torch.uint8).numpy().data


class _SharedFile:
    """Write ranges of a file that is there; other ranks write others. Small neighbours are written as one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY)
        self._waiting: list[memoryview] = []
        self._begin = self._end = 0  # of what waits
        self._from, self._to = 0, 0  # of what was written without a start of its write-back

    def __enter__(self) -> "_SharedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset, now or before the end. They must stay as they are until then."""
        if offset != self._end or len(data) >= _SMALL_BYTES:
            self._flush()
            self._begin = self._end = offset
        self._waiting.append(data)
        self._end += len(data)
        if self._end - self._begin >= _SMALL_BYTES:
            self._flush()

    def begin_write_back(self) -> None:
        """Write all, and let the system begin to bring it to the disk."""
        self._flush()
        begin_write_back(self._descriptor, self._from, self._to - self._from)

    def finish(self) -> None:
        """Make what was written durable, and close."""
        with naming(self._path):
            os.fsync(self._descriptor)
        self._close()

    def _flush(self) -> None:
        data = self._waiting[0] if len(self._waiting) == 1 else memoryview(b"".join(self._waiting))
        self._waiting = []
        if self._begin != self._to:
            self._from = self._begin
        with naming(self._path):
            while data:
                count = os.pwrite(self._descriptor, data, self._begin)
                self._begin += count
                data = data[count:]
        self._to = self._begin
        if self._to - self._from >= WRITE_BACK_BYTES:
            begin_write_back(self._descriptor, self._from, self._to - self._from)
            self._from = self._to

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

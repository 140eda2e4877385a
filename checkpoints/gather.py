"""Gather the pieces of each file on the rank that writes it, one bounded bucket at a time.

All ranks know the plan: which rank owns which file, and which rank holds which range of which tensor. So messages need
no header: their content follows from the round. No rank holds more than two buckets of other ranks' data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from shardlaunch.checkpoints.layout import TensorFile
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.state import Fragment, TensorSpec
from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT

BUCKET_BYTES = 16 << 20
# A rank may have to send to every other rank in one round, so more ranks get smaller buckets.
ROUND_BYTES = 256 << 20


class Piece(NamedTuple):
    """Elements [start, end) of a tensor and the rank that provides them."""

    spec: TensorSpec
    start: int
    end: int
    provider: int

    @property
    def num_bytes(self) -> int:
        return (self.end - self.start) * BYTES_PER_ELEMENT[self.spec.dtype]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """What one owner writes in one round: consecutive pieces of a file."""

    file: TensorFile
    pieces: tuple[Piece, ...]


def gather(
    files: Sequence[TensorFile],
    fragments: Mapping[str, Fragment],
    peers: Peers,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[TensorFile, list[memoryview]]]:
    """Yield the bytes of the files that this rank owns, in order: (file, its next bytes). All ranks, until exhausted.

    Raises AssertionError on all ranks when no rank holds some element of a tensor.
    """
    bucket_bytes = max(1 << 10, min(bucket_bytes, ROUND_BYTES // peers.num_ranks))
    plan = _plan(files, _ranges(files, fragments, peers), peers.num_ranks, bucket_bytes)
    num_rounds = max((len(buckets) for buckets in plan), default=0)
    # Each bucket is received while the previous one is written, into two alternating buffers: touching new memory would
    # cost more than the copy into it.
    buffers = [torch.empty(bucket_bytes, dtype=torch.uint8) for _ in range(2)]
    incoming = _Round(0, plan, fragments, peers, buffers[0]) if num_rounds else None
    for number in range(1, num_rounds + 1):
        assert incoming is not None
        peers.mark()
        current = incoming
        if number < num_rounds:
            incoming = _Round(number, plan, fragments, peers, buffers[number % 2])
        yield from current.finish()


class _Round:
    """Send and receive the messages of one round. The constructor starts them, so that they overlap with a write."""

    def __init__(
        self,
        number: int,
        plan: list[list[Bucket]],
        fragments: Mapping[str, Fragment],
        peers: Peers,
        buffer: torch.Tensor,
    ) -> None:
        self._fragments = fragments
        self._rank = peers.rank
        self._works: list[dist.Work] = []
        self._sending: list[torch.Tensor] = []  # kept alive until sent
        self._received: dict[int, torch.Tensor] = {}
        self._bucket = plan[peers.rank][number] if number < len(plan[peers.rank]) else None
        if self._bucket is not None:
            for provider in range(peers.num_ranks):
                num_bytes = sum(piece.num_bytes for piece in self._bucket.pieces if piece.provider == provider)
                if provider != peers.rank and num_bytes:
                    self._received[provider], buffer = buffer[:num_bytes], buffer[num_bytes:]
                    self._add(dist.irecv(self._received[provider], provider, group=peers.group, tag=number))
        for owner, buckets in enumerate(plan):
            if owner != peers.rank and number < len(buckets):
                mine = [self._local(piece) for piece in buckets[number].pieces if piece.provider == peers.rank]
                if mine:
                    self._sending.append(mine[0] if len(mine) == 1 else torch.cat(mine))
                    self._add(dist.isend(self._sending[-1], owner, group=peers.group, tag=number))

    def finish(self) -> Iterator[tuple[TensorFile, list[memoryview]]]:
        """Wait for the messages and yield this rank's bucket, if it has one in this round."""
        for work in self._works:
            work.wait()
        self._sending.clear()
        if self._bucket is None:
            return
        offsets = dict.fromkeys(self._received, 0)
        chunks = []
        for piece in self._bucket.pieces:
            if piece.provider == self._rank:
                data = self._local(piece)
            else:
                start = offsets[piece.provider]
                offsets[piece.provider] = start + piece.num_bytes
                data = self._received[piece.provider][start : start + piece.num_bytes]
            chunks.append(data.numpy().data)
        yield self._bucket.file, chunks

    def _add(self, work: dist.Work | None) -> None:
        assert work is not None
        self._works.append(work)

    def _local(self, piece: Piece) -> torch.Tensor:
        """Return the bytes of a piece that this rank holds, copied only if not contiguous in host memory."""
        fragment = self._fragments[piece.spec.key]
        flat = fragment.tensor.detach().reshape(-1)[piece.start - fragment.flat_start : piece.end - fragment.flat_start]
        return flat.to("cpu").contiguous().view(torch.uint8)


def _ranges(
    files: Sequence[TensorFile], fragments: Mapping[str, Fragment], peers: Peers
) -> dict[str, list[tuple[int, int]]]:
    """Return, by tensor key, the range that each rank holds. All ranks."""
    keys = [spec.key for file in files for spec in file.specs]
    mine = [number for key in keys for number in (fragments[key].flat_start, fragments[key].flat_end)]
    everyone = peers.gather(mine)
    return {key: [(numbers[2 * i], numbers[2 * i + 1]) for numbers in everyone] for i, key in enumerate(keys)}


def _plan(
    files: Sequence[TensorFile], ranges: Mapping[str, list[tuple[int, int]]], num_ranks: int, bucket_bytes: int
) -> list[list[Bucket]]:
    """Return each owner's buckets, one per round."""
    plan: list[list[Bucket]] = [[] for _ in range(num_ranks)]
    for file in files:
        pieces = [piece for spec in file.specs for piece in _pieces(spec, ranges[spec.key], file.owner)]
        for bucket in _buckets(pieces, bucket_bytes):
            plan[file.owner].append(Bucket(file=file, pieces=tuple(bucket)))
    return plan


def _pieces(spec: TensorSpec, ranges: Sequence[tuple[int, int]], owner: int) -> list[Piece]:
    """Return which rank provides which elements: the owner what it holds, else the first rank that holds them."""
    pieces: list[Piece] = []
    order = sorted(range(len(ranges)), key=lambda rank: rank != owner)
    position = 0
    while position < spec.num_elements:
        holders = [rank for rank in order if ranges[rank][0] <= position < ranges[rank][1]]
        assert holders, f"{spec.key}: no rank has element {position} of {spec.num_elements}"
        provider = holders[0]
        end = ranges[provider][1]
        if provider != owner and position < ranges[owner][0]:
            end = min(end, ranges[owner][0])  # the owner holds the elements from there on
        pieces.append(Piece(spec, position, end, provider))
        position = end
    return pieces


def _buckets(pieces: Sequence[Piece], bucket_bytes: int) -> Iterator[list[Piece]]:
    """Group pieces, split where needed, into buckets of at most `bucket_bytes`."""
    bucket: list[Piece] = []
    room = bucket_bytes
    for piece in pieces:
        item_bytes = BYTES_PER_ELEMENT[piece.spec.dtype]
        start = piece.start
        while start < piece.end:
            end = min(piece.end, start + max(1, room // item_bytes))
            bucket.append(piece._replace(start=start, end=end))
            room -= (end - start) * item_bytes
            start = end
            if room < 8:  # no room for an element of any dtype
                yield bucket
                bucket, room = [], bucket_bytes
    if bucket:
        yield bucket

"""Copies of a run's newest state in the memory of machines: a file per rank in a memory file system.

They outlive the processes that wrote them. A part holds what its rank writes of a checkpoint, so that all parts of a
step make one, on any ranks.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from shardlaunch.checkpoints.digests import crc64nvme
from shardlaunch.checkpoints.files import naming
from shardlaunch.checkpoints.names import step_dir_name, step_of_dir_name
from shardlaunch.checkpoints.records import DamagedRecord, Position, Record, to_json
from shardlaunch.checkpoints.shares import ALIGNED_BYTES, HostShare, Piece
from shardlaunch.checkpoints.state import TensorSpec
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES, DTYPES

_LENGTH_BYTES = 8


class PartPiece(Record):
    """Elements [start, end) of a tensor of the state."""

    position: int
    start: int
    end: int


class PartHead(Record):
    """What a part begins with."""

    step: int
    rank: int
    num_ranks: int
    run: int
    """Digest of the run's identity."""
    position: bytes
    """Of the run, as JSON."""
    aliases: dict[str, str]
    tensors: list[tuple[str, str, str, tuple[int, ...], str]]
    """Name, section, entry, shape and dtype of each tensor of the state."""
    pieces: list[PartPiece]
    crc: int
    """CRC-64/NVME of the values that follow."""
    files: dict[str, bytes]
    """What the recipe exports beside them; rank 0."""

    def specs(self) -> list[TensorSpec]:
        """Return the tensors of the state."""
        return [
            TensorSpec(name=name, section=section, entry=entry, shape=shape, dtype=DTYPES[dtype])
            for name, section, entry, shape, dtype in self.tensors
        ]


def head_of(
    share: HostShare,
    position: Position,
    *,
    rank: int,
    num_ranks: int,
    run: int,
    aliases: Mapping[str, str],
    files: Mapping[str, bytes],
) -> bytes:
    """Return what the part of a rank begins with."""
    head = PartHead(
        step=position.step,
        rank=rank,
        num_ranks=num_ranks,
        run=run,
        position=to_json(msgspec.to_builtins(position)),
        aliases=dict(aliases),
        tensors=[(spec.name, spec.section, spec.entry, spec.shape, DTYPE_NAMES[spec.dtype]) for spec in share.specs],
        pieces=[PartPiece(position=piece.position, start=piece.start, end=piece.end) for piece in share.pieces],
        crc=crc64nvme(share.memory.numpy().data),
        files=dict(files),
    )
    data = msgspec.msgpack.encode(head)
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data + b"\0" * (-len(data) % ALIGNED_BYTES)


def part_path(folder: Path, step: int, rank: int, num_ranks: int) -> Path:
    """Return where a part of a step stands in a folder of parts."""
    return folder / step_dir_name(step) / f"rank-{rank:05d}-of-{num_ranks:05d}"


def write_part(path: Path, chunks: Iterable[memoryview | bytes]) -> None:
    """Write a part, which has its name only once it is whole. Raises OSError that names the file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = path.with_name(f".{path.name}")
    try:
        with open(unfinished, "wb", buffering=0) as file, naming(unfinished):
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    left = left[file.write(left) :]
        unfinished.rename(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


def parts_in(folder: Path) -> list[tuple[int, int, int]]:
    """Return step, number of ranks and rank of each part in a folder."""
    found = []
    for path in sorted(folder.glob("step-*/rank-*-of-*")):
        step = step_of_dir_name(path.parent.name)
        _, rank, _, num_ranks = path.name.split("-")
        if step is not None and rank.isdigit() and num_ranks.isdigit():
            found.append((step, int(num_ranks), int(rank)))
    return found


def encoded_head(path: Path, run: int) -> bytes:
    """Return the head of a part as `decoded_head` takes it. Raises DamagedRecord, also for one of another run."""
    return msgspec.msgpack.encode(_read(path, run)[0])


def decoded_head(data: bytes) -> PartHead:
    """Return the head that another rank has read."""
    return msgspec.msgpack.decode(data, type=PartHead)


def read_pieces(path: Path, run: int) -> list[Piece]:
    """Return the pieces of a part, whose values stay in the file.

    Raises DamagedRecord where they are not what was written, or of another run.
    """
    head, data = _read(path, run)
    if crc64nvme(data.data) != head.crc:
        raise DamagedRecord(f"{path}: the values are not those that were written")
    specs, values = head.specs(), torch.from_numpy(data)
    pieces, begin = [], 0
    for one in head.pieces:
        spec = specs[one.position]
        num_bytes = (one.end - one.start) * spec.dtype.itemsize
        piece = values[begin : begin + num_bytes].view(spec.dtype)
        pieces.append(Piece(one.position, spec, one.start, one.end, piece))
        begin += num_bytes + -num_bytes % ALIGNED_BYTES
    return pieces


def _read(path: Path, run: int) -> tuple[PartHead, "np.ndarray[Any, np.dtype[np.uint8]]"]:
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c")  # torch wants memory that could be written
        length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
        head = msgspec.msgpack.decode(data[_LENGTH_BYTES : _LENGTH_BYTES + length].tobytes(), type=PartHead)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise DamagedRecord(f"{path}: not a readable part of a state ({error})") from error
    if head.run != run:
        raise DamagedRecord(f"{path}: is of another run")
    return head, data[_LENGTH_BYTES + length + -length % ALIGNED_BYTES :]


def forget(folder: Path, *, but: Sequence[int] = ()) -> None:
    """Delete the parts of all steps but some."""
    for path in folder.glob("step-*"):
        if step_of_dir_name(path.name) not in but:
            shutil.rmtree(path, ignore_errors=True)
    if not but:
        with suppress(OSError):
            os.rmdir(folder)

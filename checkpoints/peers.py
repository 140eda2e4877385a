"""The ranks that save or load a checkpoint together. They exchange tensors, never pickled objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from shardlaunch.checkpoints.files import PassingError, error_text, is_transient
from shardlaunch.errors import UserError

T = TypeVar("T")

_TEXT_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Peers:
    """This rank and the CPU process group of the ranks that work together (None: a single rank)."""

    rank: int = 0
    num_ranks: int = 1
    group: dist.ProcessGroup | None = None
    on_collective: Callable[[], None] | None = None
    """Called as a collective begins: on all ranks alike."""

    def mark(self) -> None:
        """Note that all ranks alike go on."""
        if self.on_collective is not None:
            self.on_collective()

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return every rank's values (64-bit, equally many on each rank). All ranks."""
        self.mark()
        if self.num_ranks == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(everyone, mine, group=self.group)
        return [one.tolist() for one in everyone]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of all ranks' numbers (int64). All ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def xor(self, values: np.ndarray) -> np.ndarray:
        """Return the exclusive or of all ranks' numbers (uint64). All ranks."""
        return self._reduced(values.view(np.int64), dist.ReduceOp.BXOR).view(np.uint64)

    def most(self, values: Sequence[int]) -> list[int]:
        """Return the largest of all ranks' values (64-bit), one by one. All ranks."""
        return [int(value) for value in self._reduced(np.array(values, dtype=np.int64), dist.ReduceOp.MAX)]

    def any(self, value: bool) -> bool:
        """Return whether any rank says so. All ranks."""
        return bool(self.most([value])[0])

    def _reduced(self, values: np.ndarray, operation: dist.ReduceOp.RedOpType) -> np.ndarray:
        self.mark()
        result = torch.from_numpy(values.copy())
        if self.num_ranks > 1:
            dist.all_reduce(result, op=operation, group=self.group)
        return result.numpy()

    def of_first(self, values: Sequence[int]) -> list[int]:
        """Return rank 0's values (64-bit, any number of them) on every rank. All ranks."""
        data = self.data_of(0, np.array(values, dtype=np.int64).tobytes())
        return [int(value) for value in np.frombuffer(data, dtype=np.int64)]

    def lists(self, values: Sequence[int]) -> list[list[int]]:
        """Return every rank's values (64-bit, any number of them). All ranks."""
        counts = [count for (count,) in self.gather([len(values)])]
        everyone = self.gather([*values, *[0] * (max(counts) - len(values))])
        return [found[:count] for found, count in zip(everyone, counts, strict=True)]

    def data_of(self, rank: int, data: bytes) -> bytes:
        """Return the bytes of one rank on every rank. All ranks."""
        self.mark()
        if self.num_ranks == 1:
            return data
        size = torch.tensor(len(data))
        dist.broadcast(size, rank, group=self.group)
        if size == 0:
            return b""
        sent = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == rank:
            sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(sent, rank, group=self.group)
        return sent.numpy().tobytes()

    def share_error(self, error: str | None) -> str | None:
        """Return the error of the lowest rank that has one, on every rank; None if no rank has. All ranks."""
        self.mark()
        if self.num_ranks == 1:
            return error
        failed = torch.tensor(self.num_ranks if error is None else self.rank)
        dist.all_reduce(failed, op=dist.ReduceOp.MIN, group=self.group)
        if failed == self.num_ranks:
            return None
        text = (error or "unknown error").encode()[:_TEXT_BYTES] if failed == self.rank else b""
        sent = torch.frombuffer(bytearray(text.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8)
        dist.broadcast(sent, int(failed), group=self.group)
        return bytes(sent.tolist()).rstrip(b"\0").decode(errors="replace")

    def together(self, work: Callable[[], T]) -> T:
        """Run `work`; raise on every rank if it failed on any. All ranks.

        Raises UserError with the lowest failing rank's message if `work` raised a UserError or OSError on any rank,
        and as a PassingError if that may pass.
        """
        error: str | None = None
        may_pass = False
        result: T | None = None
        try:
            result = work()
        except (UserError, OSError) as failure:
            error = error_text(failure) if isinstance(failure, OSError) else str(failure) or repr(failure)
            may_pass = is_transient(failure)
        error = self.share_error(error)
        if error is not None:
            raise PassingError(error) if self.any(may_pass) else UserError(error)
        return result  # type: ignore[return-value]

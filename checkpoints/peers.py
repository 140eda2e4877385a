"""The ranks that save or load a checkpoint together. They exchange tensors, never objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from shardlaunch.errors import UserError

T = TypeVar("T")

_TEXT_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Name this rank among those that work together over a CPU process group (None: alone)."""

    rank: int = 0
    num_ranks: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return every rank's values (64-bit, as many on each rank). All ranks."""
        if self.num_ranks == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(everyone, mine, group=self.group)
        return [one.tolist() for one in everyone]

    def share_error(self, error: str | None) -> str | None:
        """Tell all ranks of an error; return the first rank's that has one, None when nobody has. All ranks."""
        if self.num_ranks == 1:
            return error
        text = b"" if error is None else (error or "unknown error").encode()[:_TEXT_BYTES]
        mine = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else mine[:0]
        everyone = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(everyone, mine, group=self.group)
        for one in everyone:
            data = bytes(one.tolist()).rstrip(b"\0")
            if data:
                return data.decode(errors="replace")
        return None

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` here and learn whether it went well everywhere. All ranks.

        Raises UserError with the first failing rank's message when a UserError or an OSError ended it on any rank.
        """
        error: str | None = None
        result: T | None = None
        try:
            result = work()
        except (UserError, OSError) as failure:
            error = str(failure) or repr(failure)
            if isinstance(failure, OSError) and failure.filename:
                error = f"{failure.filename}: {failure.strerror}"
        error = self.share_error(error)
        if error is not None:
            raise UserError(error)
        return result  # type: ignore[return-value]

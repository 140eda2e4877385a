"""How far a plan was off: the peak of memory that `shardlaunch plan --json` foresaw, and that of the run."""

from pathlib import Path

import msgspec
import torch

from shardlaunch.errors import UserError, some
from shardlaunch.sharding.world import World

GIB = 1 << 30


class _Memory(msgspec.Struct):
    peak: int


class _Plan(msgspec.Struct):
    strategy: str
    memory: _Memory | None = None


class _Document(msgspec.Struct):
    strategies: list[_Plan]


def planned_peak(path: str, strategy: str, world: World) -> int:
    """Return the bytes that a plan's file foresees for a strategy, per rank. Raises UserError if it has none."""
    if world.device.type != "cuda":
        raise UserError("--plan: is compared with the memory of GPUs, and this run uses none; remove it")
    try:
        document = msgspec.json.decode(Path(path).read_bytes(), type=_Document)
    except OSError as error:
        raise UserError(f"--plan {path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UserError(f"--plan {path}: is not the output of `shardlaunch plan --json` ({error})") from error
    peaks = {plan.strategy: plan.memory.peak for plan in document.strategies if plan.memory is not None}
    if strategy not in peaks:
        raise UserError(f"--plan {path}: has no plan for {strategy}; it has {some(peaks) or 'none'}")
    return peaks[strategy]


def comparison(planned: int, world: World) -> str:
    """Return a line on how far a plan was off, for the rank that used the most. All ranks."""
    used = max(peak for (peak,) in world.peers.gather([torch.cuda.max_memory_allocated(world.device)]))
    return comparison_text(planned, used)


def comparison_text(planned: int, used: int) -> str:
    """Return a line on how far a plan was off."""
    return (
        f"memory: {planned / GIB:.2f} GiB planned, {used / GIB:.2f} GiB used at most on a rank "
        f"({100 * (planned / used - 1):+.1f} %)"
    )

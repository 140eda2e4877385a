"""What is checked of the output folder before a run trains: all hosts share it, its lock holds, it has room."""

import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shardlaunch.checkpoints.files import is_there, retried
from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.reader import Checkpoint, checkpoint_steps
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.run_lock import LOCK, lock
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.sharding.world import World

SEEN, WRITTEN = ".shared-", ".written-"
SEEN_WITHIN_S = 5.0  # a network file system may show a new file late
POLL_INTERVAL_S = 0.02


def check_shared(output_dir: Path, world: World, *, warn: Callable[[str], None]) -> None:
    """Check that the first rank of each host sees the folder that rank 0 has claimed, and can write there. All ranks.

    Raises UserError where one does not; warns where the lock of the folder does not hold between hosts.
    """
    if world.is_main:  # a start that was killed in here has left its file
        for name in (SEEN, WRITTEN):
            for left in output_dir.glob(f"{name}*"):
                with suppress(OSError):
                    left.unlink()
    if world.local_size == world.size:
        return
    peers, is_first = world.peers, world.is_local_main and not world.is_main
    path = output_dir / f"{SEEN}{peers.of_first([secrets.randbits(62)])[0]:016x}"
    try:
        peers.together(lambda: retried(path.touch) if world.is_main else None)
        peers.together(lambda: _require_seen(path, world.rank) if is_first else None)
        peers.together(lambda: _require_writable(output_dir, world.rank) if is_first else None)
    finally:
        if world.is_main:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    if peers.any(is_first and _can_be_locked(output_dir)):
        warn(
            f"--output-dir {output_dir}: its lock does not hold between hosts. Nothing notices if a run on another "
            f"host uses this folder at the same time: see to it that none does"
        )


def _require_seen(path: Path, rank: int) -> None:
    end = time.monotonic() + SEEN_WITHIN_S
    while not retried(lambda: is_there(path)):
        if time.monotonic() > end:
            raise UserError(
                f"--output-dir {path.parent.absolute()}: is not shared between the hosts: rank {rank}, on "
                f"{socket.gethostname()}, does not see what rank 0 has written there. Choose a folder on a file system "
                f"that all hosts have mounted, under the same path"
            )
        time.sleep(POLL_INTERVAL_S)


def _require_writable(output_dir: Path, rank: int) -> None:
    path = output_dir / f"{WRITTEN}{secrets.randbits(62):016x}"
    try:
        retried(path.touch)
        path.unlink()
    except OSError as error:
        raise UserError(
            f"--output-dir {output_dir.absolute()}: cannot be written by rank {rank}, on {socket.gethostname()} "
            f"({error.strerror}). Every host writes its part of each checkpoint: let all of them write there"
        ) from error


def _can_be_locked(output_dir: Path) -> bool:
    """Return whether a lock that rank 0 holds is given to this process too."""
    try:
        descriptor = os.open(output_dir / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        lock(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


class Room:
    """The room on the disk for the checkpoints of a run, beside those that are there."""

    def __init__(self, output_dir: Path, options: Options, world: World, *, warn: Callable[[str], None]) -> None:
        self._output_dir = output_dir
        self._options = options
        self._world = world
        self._warn = warn
        self._is_said = False

    def check_start(self, resumed: Checkpoint | None, num_elements: int, position: Position, *, last_step: int) -> None:
        """Check it by the size of the checkpoint that is resumed, or by that of the weights. All ranks."""
        if not position.is_finished:
            sizes = resumed.manifest.files.values() if resumed is not None else ()
            num_bytes = sum(record.num_bytes for record in sizes) or 4 * num_elements
            self.check(num_bytes, steps_left=last_step - position.step, is_exact=resumed is not None)

    def check(self, num_bytes: int, *, steps_left: int, is_exact: bool) -> None:
        """Check that there is room for checkpoints of a size, or of at least it. All ranks.

        Raises UserError if not even one fits; warns, once, if those do not that will be there at the same time.
        """
        self._world.peers.together(
            lambda: self._check(num_bytes, steps_left, is_exact) if self._world.is_main else None
        )

    def _check(self, num_bytes: int, steps_left: int, is_exact: bool) -> None:
        where = self._output_dir
        try:
            free_bytes = shutil.disk_usage(self._output_dir).free
            num_there = len(checkpoint_steps(self._output_dir / CHECKPOINTS))
        except OSError as error:
            self._say(f"--output-dir {where}: the room on its disk cannot be found out: {error.strerror}")
            return
        size = f"{'' if is_exact else 'at least '}{bytes_text(num_bytes)}"
        if free_bytes < num_bytes:
            raise UserError(
                f"--output-dir {where}: {bytes_text(free_bytes)} are free; one checkpoint takes {size}. Make room, "
                f"or choose another folder."
            )
        num_more = self._num_more(num_there, steps_left)
        if free_bytes < num_more * num_bytes:
            there = f", beside the {num_there} that {'is' if num_there == 1 else 'are'} there" if num_there else ""
            free = bytes_text(free_bytes)
            self._say(
                f"--output-dir {where}: {free} are free, but {num_more} more checkpoints of {size} are to come at the "
                f"same time{there}. Saves will fail when the disk is full: make room, or lower --keep"
            )

    def _num_more(self, num_there: int, steps_left: int) -> int:
        """Return how many more checkpoints there will be at the same time: --keep, one that is written, the best."""
        options = self._options
        every = options.save_every
        num_saves = steps_left if every == "auto" else -(-steps_left // every) if every else 1
        if not options.keep:
            return max(1, num_saves)
        most = options.keep + 1 + options.save_on_best + bool(options.save_to)  # one that is being copied stays too
        return max(1, min(most - num_there, num_saves + options.save_on_best))

    def _say(self, text: str) -> None:
        if not self._is_said:
            self._is_said = True
            self._warn(text)


def bytes_text(num_bytes: int) -> str:
    """Return a number of bytes with its unit."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"

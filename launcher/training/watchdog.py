"""Notice that a run has come to a stop, from a thread of each rank; `hang_report` says where and ends it.

A rank is given a multiple of the longest time that it has been without progress in what it does now. A rank that is
ahead of another waits for it, however long: the run ends when those that are behind are over their limit, or silent.
"""

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from shardlaunch.launcher.training.hang import Seen, hung
from shardlaunch.launcher.training.hang_report import HANGS, Hang, Memory, end_run, local_stopped, place_of
from shardlaunch.progress import DATA, progress
from shardlaunch.sharding.heartbeats import (
    Beat,
    Heartbeats,
    collectives_begun,
    last_collective,
    process_of,
    this_process,
)
from shardlaunch.sharding.world import World

LONGEST_TIMES = 5
"""How much longer something may take than it has so far."""
FIRST_TIMES = 3
"""The multiple of --hang-after-s for what has not ended once yet, such as a phase or a first step, which compiles."""
BUSY_FIRST_TIMES = 12
"""The same while the process computes."""
LONGEST_INTERVAL_S = 1.0
SILENT_AFTER_S = 5.0
LEAST_BYTES = 1 << 20
"""Read and written between two looks, by a phase that is alive."""
_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "ipdb", "pudb")


class Watchdog:
    """The watchdog of this rank. `after_s` is the least time without progress after which a run ends."""

    def __init__(self, world: World, *, after_s: float, hangs_dir: Path) -> None:
        self._world = world
        self._after_s = after_s
        self._hangs_dir = hangs_dir
        self._interval_s = min(LONGEST_INTERVAL_S, after_s / 10)
        self._silent_after_s = min(SILENT_AFTER_S, after_s / 2)
        self.main_thread = threading.main_thread().ident
        self._process = psutil.Process()
        self._identity = this_process()
        self._memory = Memory(progress)
        self._looked_at = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._heartbeats = Heartbeats(world, self._beat, interval_s=self._interval_s)
        self._number = 0
        self._seen: object = None
        self._kind = ""
        self._age_s = 0.0
        self._cpu_s = 0.0  # that the process had used when its last progress was seen
        self._num_bytes = -1
        self._longest_s: dict[str, float] = {}
        self._is_debugged = False
        self._others: dict[int, Seen] = {}
        self._num_answers = 0
        self._unanswered_s = 0.0

    def start(self) -> None:
        self._looked_at = time.monotonic()
        self._heartbeats.start()
        self._thread.start()

    def stop(self) -> None:
        """End the watch. Waits for the end of the process if a hang is being reported."""
        self._stopping.set()
        self._thread.join()
        self._heartbeats.stop()
        self.close()

    def close(self) -> None:
        """Let go of what the process has for the watch."""
        self._memory.close()

    @property
    def _limit_s(self) -> float:
        """Return how long this rank may be without progress."""
        kind = progress.kind
        if kind in progress.measured:
            return max(self._after_s, LONGEST_TIMES * self._longest_s.get(kind, 0.0))
        is_busy = self._age_s > self._after_s and time.process_time() - self._cpu_s > self._age_s / 2
        return self._after_s * (BUSY_FIRST_TIMES if is_busy else FIRST_TIMES)

    @property
    def _is_stalled(self) -> bool:
        """Return whether this rank has made no progress for long enough to look around."""
        return self._age_s > self._after_s / 4

    def _beat(self) -> Beat:
        self._number += 1
        host, pid, born = self._identity
        return Beat(
            number=self._number,
            place=place_of(progress),
            collective=last_collective(self._world) if self._is_stalled else "",
            num_marks=progress.num_marks,
            collectives=collectives_begun(self._world),
            age_s=self._age_s,
            limit_s=self._limit_s,
            is_debugged=self._is_debugged,
            has_left=self._stopping.is_set(),
            host=host,
            pid=pid,
            notes=self._memory.notes,
            stacks=self._memory.stacks,
            born=born,
        )

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._interval_s):
                self.look(self.ran_s())
                hang = self.find_hang()
                if hang is not None and not self._stopping.is_set():
                    self._heartbeats.cease()
                    beats, memory = self._heartbeats, self._memory
                    end_run(hang, world=self._world, heartbeats=beats, memory=memory, folder=self._hangs_dir)
        except Exception:  # the run goes on without
            print("the watchdog of this rank has failed:", file=sys.stderr)
            traceback.print_exc()

    def ran_s(self) -> float:
        """Return the time since the last call, without that in which the process was stopped, or had no core."""
        last, self._looked_at = self._looked_at, time.monotonic()
        return min(self._looked_at - last, 2 * self._interval_s)

    def look(self, ran_s: float) -> None:
        """Take note of what this rank and the others have done in the last `ran_s` seconds."""
        progress.note_look()
        self._note_progress(ran_s)
        self._is_debugged = self._is_stalled and self._find_debugger()
        if self._is_debugged or (self._is_stalled and self._is_reading_or_writing()):
            self._age_s = 0.0
        self._note_others(ran_s)

    def _note_progress(self, ran_s: float) -> None:
        loaded = tuple(map(tuple, progress.workers)) if progress.kind == DATA else ()
        seen = (progress.num_changes, loaded)
        self._age_s += ran_s
        if seen != self._seen:
            self._longest_s[self._kind] = max(self._age_s, self._longest_s.get(self._kind, 0.0))
            self._seen, self._kind, self._age_s = seen, progress.kind, 0.0
            self._cpu_s, self._num_bytes = time.process_time(), -1

    def _note_others(self, ran_s: float) -> None:
        beats = self._heartbeats
        was_looking, beats.is_looking = beats.is_looking, self._is_stalled
        if beats.num_answers == self._num_answers:
            self._unanswered_s += ran_s
            return  # what the others say is not known
        self._num_answers, self._unanswered_s = beats.num_answers, 0.0
        for rank, beat in beats.others.items():
            before = self._others.get(rank)
            is_new = before is None or before.beat.number != beat.number or not (was_looking or beats.is_up_to_date)
            self._others[rank] = Seen(beat, 0.0 if is_new or before is None else before.silence_s + ran_s)

    def find_hang(self) -> Hang | None:
        """Return the hang that this rank sees, or hears of."""
        mine = self._beat()
        ranks = {**self._others, self._world.rank: Seen(mine, 0.0)}
        if self._heartbeats.is_hang_known:
            return Hang(ranks, late=[])
        is_over_limit = self._age_s > self._limit_s
        if self._heartbeats.is_alone:
            return Hang(ranks, late=[0]) if is_over_limit else None
        if self._unanswered_s > self._silent_after_s:
            is_cut_off = is_over_limit and self._unanswered_s > self._after_s / 2
            if not is_cut_off:
                return None
            silent = {rank: Seen(seen.beat, self._unanswered_s) for rank, seen in self._others.items()}
            late = local_stopped(silent) or [0]
            return Hang({**silent, self._world.rank: Seen(mine, 0.0)}, late=late, is_cut_off=True)
        if len(ranks) < self._world.size or not self._is_stalled:
            return None
        late = hung(ranks, silent_after_s=self._silent_after_s)
        for rank in late:
            process = process_of(ranks[rank].beat)
            if process is not None and _status(process) == psutil.STATUS_TRACING_STOP:  # a debugger holds it
                self._others = {}
                self._is_debugged = True
                return None
        return Hang(ranks, late=late) if late else None

    def _find_debugger(self) -> bool:
        """Return whether somebody looks at this process with a debugger, so that it may stand still."""
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("TracerPid:") and line.split()[1] != "0":
                    return True
        frame: FrameType | None = sys._current_frames().get(self.main_thread or 0)
        while frame is not None:
            if str(frame.f_globals.get("__name__", "")).partition(".")[0] in _DEBUGGERS:
                return True
            frame = frame.f_back
        return False

    def _is_reading_or_writing(self) -> bool:
        """Return whether a phase, which may say nothing, has read or written since the last look."""
        if not progress.is_in_phase:
            return False
        before, self._num_bytes = self._num_bytes, 0
        with suppress(psutil.Error, AttributeError):  # a system that does not count them
            for process in (self._process, *self._process.children(recursive=True)):
                counters = process.io_counters()
                self._num_bytes += counters.read_chars + counters.write_chars
        return before >= 0 and self._num_bytes - before > LEAST_BYTES


def _status(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return str(process.status())
    return ""


@contextmanager
def watched(world: World, *, after_s: float, output_dir: Path) -> Iterator[None]:
    """End the run when it makes no progress; `after_s` 0: never. All ranks.

    At the end the ranks wait for each other, so that one that does not come is noticed too.
    """
    if not after_s:
        yield
        return
    watchdog = Watchdog(world, after_s=after_s, hangs_dir=output_dir / HANGS)
    watchdog.start()
    try:
        yield
        progress.begin("ending")
        progress.mark()
        world.meet_at_end()
    finally:
        watchdog.stop()

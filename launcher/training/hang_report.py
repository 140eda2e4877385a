"""Say where a run has come to a stop, on stderr and in the run's folder, and end it."""

import faulthandler
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from shardlaunch.errors import EXIT_HUNG, MOST_NAMED, some
from shardlaunch.launcher.training.hang import Seen
from shardlaunch.progress import COUNT, NUM_NOTES, PID, SAMPLE, STEP, Notes, Progress, notes_in
from shardlaunch.sharding.heartbeats import Beat, Heartbeats, process_of
from shardlaunch.sharding.world import World

REPORT = "report.txt"
HANGS = "hangs"
"""Folder in that of a run, with a file per rank that came to a stop."""
MOST_REPORTING_S = 30.0  # also if the disk is what hangs
OTHERS_KNOW_S = 5.0
DUMP_S = 0.5
# Free on all systems that have signals of this kind, where files in memory are too.
DUMP_SIGNAL: int | None = signal.SIGRTMIN + 5 if hasattr(os, "memfd_create") else None
_STATES = {
    psutil.STATUS_STOPPED: "its process is stopped by a signal",
    psutil.STATUS_ZOMBIE: "its process has ended",
    psutil.STATUS_DISK_SLEEP: "its process waits for a disk",
}


@dataclass(frozen=True)
class Hang:
    """All ranks as this one sees them, and those that the others wait for."""

    ranks: Mapping[int, Seen]
    late: Sequence[int]
    is_cut_off: bool = False
    """The store does not answer, so that nothing is known of the others."""


def place_of(now: Progress) -> str:
    """Return where this process is, as text."""
    workers = [
        f"loading process {number} ({_state(int(worker[PID])) or 'alive'}): {_samples(worker)}"
        for number, worker in enumerate(now.workers)
        if worker[STEP]
    ]
    return "; ".join([_place(now.notes, now.kind), *workers])


def _place(notes: Notes, kind: str) -> str:
    step = f"step {notes.step}" if notes.step else "before the first step"
    slot = f", micro-batch {notes.slot} of {notes.num_slots}" if notes.slot and notes.is_in_slot else ""
    loading = f"; {_samples(notes.loading)}" if notes.loading[STEP] else ""
    return f"{step}{slot}, {kind}{loading}"


def last_place(beat: Beat) -> str:
    """Return where a rank is that says nothing: from its memory if it is one of this machine, else where it was."""
    notes = _notes_of(beat)
    if notes is not None and notes.kind:
        return _place(notes, notes.kind)
    return f"{beat.place} (when it last said so)"


def _notes_of(beat: Beat) -> Notes | None:
    """Return the notes of a process, if it is one of this machine."""
    with suppress(OSError, ValueError, TypeError):
        if process_of(beat) is not None:
            memory = Path(f"/proc/{beat.pid}/fd/{beat.notes}").read_bytes()
            return notes_in(memoryview(memory).cast("q"))
    return None


def _is_alive(seen: Seen) -> bool:
    """Return whether a rank of this machine runs as usual, so that only the network keeps it from being heard."""
    notes = _notes_of(seen.beat)
    return notes is not None and time.monotonic() - notes.looked_ms / 1000 < seen.silence_s / 2


def _samples(loading: Sequence[int]) -> str:
    first, count = int(loading[SAMPLE]), int(loading[COUNT])
    samples = f"sample {first}" if count == 1 else f"{count} samples from {first} on" if count else "collating samples"
    step = int(loading[STEP])
    return f"{'loading ' if count else ''}{samples}{f' for step {step}' if step > 0 else ''}"


def _state(pid: int) -> str:
    with suppress(psutil.Error):
        return _STATES.get(psutil.Process(pid).status(), "")
    return "gone"


def local_stopped(ranks: Mapping[int, Seen]) -> list[int]:
    """Return the ranks of this machine whose processes a signal has stopped."""
    processes = {rank: process_of(seen.beat) for rank, seen in ranks.items()}
    return [rank for rank, process in processes.items() if process is not None and _state(process.pid)]


def message(hang: Hang, *, me: int, folder: Path) -> str:
    """Return what is said of a hang, by one rank for all."""
    late = [_late_text(rank, hang.ranks[rank]) for rank in hang.late]
    if len(late) > MOST_NAMED:
        late[MOST_NAMED:] = [f"and {len(late) - MOST_NAMED} more ranks"]
    lines = [f"error: the run hangs: {late[0]}"] if len(late) == 1 else ["error: the run hangs:", *late]
    waiting = [rank for rank, seen in sorted(hang.ranks.items()) if rank not in hang.late and not seen.beat.has_left]
    if hang.is_cut_off:
        lines.append("the store of this launch does not answer: it is in rank 0's process, or in its launcher")
    if waiting:
        first = me if me in waiting else waiting[0]
        where = _where(hang.ranks[first].beat)
        all_ = f"ranks {some(map(str, waiting))} wait for it, rank {first}: {where}"
        lines.append(all_ if len(waiting) > 1 else f"rank {first} waits for it: {where}")
    lines.append(
        f"Where each rank is: {folder}. --hang-after-s sets another time. The run ends with status {EXIT_HUNG}; the "
        f"same command resumes from the last checkpoint, if there is one."
    )
    return "\n".join(lines)


def _late_text(rank: int, seen: Seen) -> str:
    process = process_of(seen.beat)
    state = _state(process.pid) if process is not None else ""
    if not state and seen.silence_s:
        state = "it says nothing: its process is held up, or its machine or the network is gone"
        if process is not None:
            state = "it says nothing: some code that is not Python does not give way to its other threads"
            if _is_alive(seen):
                state = "it runs, but the network between the ranks is down"
    remark = f" ({state})" if state else ""
    return f"rank {rank} has made no progress for {seen.without_progress_s:.0f} s: {_place_of_rank(seen)}{remark}"


def _place_of_rank(seen: Seen) -> str:
    return last_place(seen.beat) if seen.silence_s else _where(seen.beat)


def _where(beat: Beat) -> str:
    return beat.place + f"; {beat.collective}" * bool(beat.collective)


class Memory:
    """Files in memory that others can read while this process is stuck: its notes, and the stacks of its threads.

    A signal has it write the stacks, also where Python is stuck, and so do processes that it forks. The signal is for
    others: its handler reads the frames of threads that may run on meanwhile, and where one does, the process may end
    with a segmentation fault.
    """

    def __init__(self, source: Progress) -> None:
        self.notes = self.stacks = -1
        if DUMP_SIGNAL is not None:
            self.notes, self.stacks = os.memfd_create("notes"), os.memfd_create("stacks")
            os.truncate(self.notes, 8 * NUM_NOTES)
            source.keep_in(memoryview(mmap.mmap(self.notes, 8 * NUM_NOTES)))
            faulthandler.register(DUMP_SIGNAL, file=self.stacks, all_threads=True, chain=False)

    def write_own_stacks(self) -> None:
        """Write the stacks of this process, whose other threads wait meanwhile."""
        if DUMP_SIGNAL is not None:
            faulthandler.dump_traceback(self.stacks, all_threads=True)

    def close(self) -> None:
        """Let the signal have its usual effect again. The notes go on, for this process alone."""
        if DUMP_SIGNAL is not None:
            faulthandler.unregister(DUMP_SIGNAL)
            os.close(self.notes)
            os.close(self.stacks)


def _stacks_of(pids: Sequence[int], file: str) -> str:
    """Have processes write their stacks, one after the other, and return what is then in the file."""
    if DUMP_SIGNAL is None:
        return ""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, DUMP_SIGNAL)
            _await_written(file)
    try:
        return Path(file).read_text(errors="replace")
    except OSError:
        return ""


def _await_written(file: str) -> None:
    """Wait until a file has grown and does so no more, for a while at most: a stopped process writes nothing."""
    end, sizes = time.monotonic() + DUMP_S, [os.stat(file).st_size]
    while time.monotonic() < end and not sizes[0] < sizes[-1] == sizes[-2]:
        time.sleep(DUMP_S / 10)
        sizes.append(os.stat(file).st_size)


def end_run(hang: Hang, *, world: World, heartbeats: Heartbeats, memory: Memory, folder: Path) -> NoReturn:
    """Report a hang, on one rank for all, and end this process; also those of this machine that say nothing."""
    try:  # in a thread, because a disk may be what hangs
        end = _End(hang, world=world, heartbeats=heartbeats, memory=memory, folder=folder)
        thread = threading.Thread(target=end.run, daemon=True)
        thread.start()
        thread.join(MOST_REPORTING_S)
        end.kill()
    except Exception:  # such as one that would leave the others waiting
        traceback.print_exc()
    finally:
        os._exit(EXIT_HUNG)


class _End:
    """The end of a run that hangs, on this rank."""

    def __init__(self, hang: Hang, *, world: World, heartbeats: Heartbeats, memory: Memory, folder: Path) -> None:
        self._hang = hang
        self._world = world
        self._heartbeats = heartbeats
        self._memory = memory
        self._folder = folder
        self._silent = [rank for rank in hang.late if hang.ranks[rank].silence_s]
        # Found before they are asked for their stacks: the signal wakes some from a system call, into the next one.
        self._stuck = self._stuck_here()

    def run(self) -> None:
        """Report; the rank that does so for all waits until the others know, since they lose it when it ends."""
        beats = self._heartbeats
        if self._hang.is_cut_off:
            beats.give_up()
        is_first = self._is_first()
        beats.acknowledge()
        if not is_first:
            self._write_own()
            beats.await_reported(most_s=MOST_REPORTING_S / 2)
            self._silent = beats.silent or self._silent
            self._stuck = self._stuck or self._stuck_here()
            self._leave()
            return
        beats.await_acknowledged(self._num_live(), most_s=OTHERS_KNOW_S)
        text = message(self._hang, me=self._world.rank, folder=self._folder)
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"{text}\n".encode())
        self._write_own()
        places = [f"rank {rank}: {_place_of_rank(seen)}" for rank, seen in sorted(self._hang.ranks.items())]
        self._write(REPORT, "\n".join([text, "", *places]))
        for rank in self._stuck:
            beat = self._hang.ranks[rank].beat
            stacks = _stacks_of([beat.pid], f"/proc/{beat.pid}/fd/{beat.stacks}") or "no stacks: it does not run"
            self._write(f"rank-{rank}.txt", f"{last_place(beat)}\n\n{stacks}")
        beats.set_reported()
        self._leave()

    def _num_live(self) -> int:
        silent = set(self._silent)
        return sum(rank not in silent and not seen.beat.has_left for rank, seen in self._hang.ranks.items())

    def _leave(self) -> None:
        """Need the store no longer; rank 0, whose process may have it, waits until nobody does."""
        self._heartbeats.acknowledge_end()
        if self._world.is_main:
            self._heartbeats.await_ends(self._num_live(), most_s=OTHERS_KNOW_S)

    def _is_first(self) -> bool:
        if self._hang.is_cut_off:  # one of each machine; not rank 0, which may be what does not answer
            return self._world.rank == min((rank for rank in self._world.local_ranks if rank), default=0)
        return self._heartbeats.is_first(self._silent)

    def _stuck_here(self) -> list[int]:
        """Return the ranks of this machine that cannot end by themselves."""
        silent = {rank: self._hang.ranks[rank] for rank in self._silent if rank in self._hang.ranks}
        return [rank for rank, seen in silent.items() if process_of(seen.beat) is not None and not _is_alive(seen)]

    def _write_own(self) -> None:
        workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        self._memory.write_own_stacks()
        stacks = _stacks_of(workers, f"/proc/self/fd/{self._memory.stacks}")
        self._write(f"rank-{self._world.rank}.txt", f"{_where(self._hang.ranks[self._world.rank].beat)}\n\n{stacks}")

    def _write(self, name: str, text: str) -> None:
        """Add to a file of the run's folder, which has those of earlier hangs too."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / name, "a") as file:
                file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n\n")

    def kill(self) -> None:
        """Kill the processes that load data for this one, and ranks of this machine that cannot end by themselves."""
        for child in multiprocessing.active_children():
            with suppress(OSError):
                child.kill()
        for rank in self._stuck:
            process = process_of(self._hang.ranks[rank].beat)
            with suppress(psutil.Error):
                if process is not None:
                    words = process.cmdline()
                    forked = [child for child in process.children() if child.cmdline() == words]
                    for each in (process, *forked):
                        each.kill()

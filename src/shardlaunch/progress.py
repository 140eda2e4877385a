"""Where this process is in its run, and how long the parts of its steps take. Read by the watchdog of the run.

Kept in this module, not passed on, because every layer notes what it does. All of it costs a few assignments per call.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

# The parts of a step that are measured per rank.
DATA, FORWARD, BACKWARD, WAITING = PARTS = ("data", "forward", "backward", "waiting")
BETWEEN_STEPS = "between steps"
EVALUATION_DATA, EVALUATION, EVALUATION_RESULTS = "evaluation data", "evaluation", "evaluation results"
SAVING = "saving"
_KINDS = ("", *PARTS, EVALUATION, EVALUATION_DATA, EVALUATION_RESULTS, BETWEEN_STEPS, SAVING)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
NUM_NOTES = 9
# What a process that loads data notes, in this order: its number; the step from 1 whose samples it loads (0: it loads
# none, -1: they are of no step); the first of the samples that it fetches at once; how many these are (0: they are
# fetched, and collated now).
PID, STEP, SAMPLE, COUNT = range(4)


class Notes(NamedTuple):
    """Where a process is, in numbers, which can be in memory that others can read while it is stopped."""

    step: int
    """The step, of the training or of an evaluation, from 1; 0 before the first."""
    slot: int
    """The micro-batch of the step, from 1, of those of this rank; 0 before the first."""
    num_slots: int
    kind_number: int
    loading: tuple[int, ...]
    looked_ms: int
    """When the watchdog of the process last looked, by the clock of the machine since its start."""

    @property
    def kind(self) -> str:
        """Return what goes on; empty for what has no number, as most phases."""
        return _KINDS[self.kind_number]

    @property
    def is_in_slot(self) -> bool:
        return self.kind in (*PARTS, EVALUATION)


class Progress:
    """What this process does, as its main thread notes it; other threads read it."""

    def __init__(self) -> None:
        self.kind = "starting"
        """What goes on, by which it is also compared with how long it took before."""
        self.num_changes = 0
        """Grows with all that happens."""
        self.num_marks = 0
        """Grows with what happens on all ranks alike: the rank where it is lowest is behind."""
        self.measured: set[str] = set()
        """Kinds that have ended at least once."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """Time per part of a step, since the start."""
        self.workers: Sequence[Any] = ()
        """What each process that loads data for this one is loading, in memory that is shared with it."""
        self.keep_in(memoryview(bytearray(8 * NUM_NOTES)))
        self._since = time.perf_counter()
        self._outer: list[str] = []  # what goes on around the phases that are open

    def keep_in(self, memory: memoryview) -> None:
        """Keep the notes in memory of `NUM_NOTES` 64-bit integers from now on."""
        self._notes = memory.cast("q")
        self.loading: Any = self._notes[4:8]
        """The samples being loaded by this process: PID, STEP, SAMPLE, COUNT."""

    @property
    def notes(self) -> Notes:
        return notes_in(self._notes)

    @property
    def is_in_phase(self) -> bool:
        return bool(self._outer)

    def begin(self, kind: str) -> None:
        """Note that all ranks alike go on with something else."""
        now = time.perf_counter()
        if self.kind in self.seconds:
            self.seconds[self.kind] += now - self._since
        self._since = now
        self.measured.add(self.kind)
        self.kind = kind
        self._notes[3] = _NUMBERS.get(kind, 0)
        self.num_marks += 1
        self.num_changes += 1

    def begin_slot(self, kind: str, step: int, slot: int, num_slots: int) -> None:
        """Note that a micro-batch of a step (from 1) is next; `slot` counts this rank's from 0."""
        notes = self._notes
        notes[0], notes[1], notes[2] = step, slot + 1, num_slots
        self.begin(kind)

    def note_look(self) -> None:
        """Note that the watchdog has looked just now."""
        self._notes[8] = int(time.monotonic() * 1000)

    def mark(self) -> None:
        """Note that all ranks alike have come one further with what they do."""
        self.num_marks += 1
        self.num_changes += 1

    def advance(self) -> None:
        """Note that this rank has come further with what it does."""
        self.num_changes += 1

    def enter(self, phase: str) -> None:
        """Note that a phase begins, perhaps on this rank alone, within what goes on."""
        self._outer.append(self.kind)
        self.kind = phase
        self._notes[3] = _NUMBERS.get(phase, 0)
        self.num_changes += 1

    def leave(self) -> None:
        """Note that the innermost phase has ended."""
        self.measured.add(self.kind)
        self.kind = self._outer.pop()
        self._notes[3] = _NUMBERS.get(self.kind, 0)
        self._since = time.perf_counter()
        self.num_changes += 1


def notes_in(memory: memoryview) -> Notes:
    """Return the notes in a memory of integers."""
    step, slot, num_slots, kind_number, *loading, looked_ms = memory
    return Notes(step, slot, num_slots, kind_number, tuple(loading), looked_ms)


progress = Progress()

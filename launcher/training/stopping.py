"""Stop a run in time: a signal or a file asks for it, all ranks agree at the end of a step, which is saved."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from shardlaunch.checkpoints.files import retried
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from shardlaunch.launcher.training.time_left import TimeLeft

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
STOP_FILE, SAVE_FILE = "stop", "save-now"
INTERRUPTED = "interrupted; the same command resumes from the last checkpoint, if there is one"
POLL_INTERVAL_S = 1.0  # an output folder may be on a network
SAME_S = 1.0  # a launcher and a cluster may both pass on one signal
INTERRUPTION_S = 5.0  # the main thread may be in a library that waits for a rank that is gone, or drops exceptions


def handled_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: not SIGHUP where it is ignored, as nohup has it."""
    return [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def interrupted_status(name: str = "SIGINT") -> int:
    """Return the exit status of a run that the signal `name` has ended at once."""
    return EXIT_INTERRUPTED if name == "SIGINT" else EXIT_STOPPED


class Stopped(Exception):
    """The run has stopped before its end because it was asked to, and its state is saved."""

    def __init__(self, cause: str, step: int) -> None:
        where = f"stopped after step {step}, which is saved" if step else "stopped before the end of the first step"
        super().__init__(f"{cause}: {where}; the same command goes on from there")


class BrokenOff(Exception):
    """A step or an evaluation ends before its time, on all ranks in the same place."""


class Signals:
    """Signals to this process. During training the first one is kept for the end of the step.

    Before training the first one interrupts, and ends a process that has not ended soon. When the run has ended it does
    nothing. A second one ends the process at once, at any time, also while it waits for another rank.
    """

    def __init__(self, *, is_main: bool) -> None:
        self.first: signal.Signals | None = None
        self.is_training = False
        self.is_ending = False
        self.status_at_once = EXIT_INTERRUPTED
        self.first_at: float | None = None
        self._is_main = is_main
        self._is_said = False
        self._interrupts = False

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Interrupt, unless the run is training. In the main thread, when it next runs Python code."""
        if not self.is_training and not self.is_ending:
            raise KeyboardInterrupt(signal.Signals(number).name)

    def watch(self, received: socket.socket) -> None:
        """Read the numbers of signals, which arrive here even while the main thread waits in a collective."""
        received.settimeout(SAME_S)
        while True:
            try:
                numbers = received.recv(64)
            except TimeoutError:
                self._say_first()
                self._end_if_not_interrupted()
                continue
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._keep(signal.Signals(number))

    def _keep(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.first_at is None:
            self.first, self.first_at, self._interrupts = number, now, not self.is_training
        elif now - self.first_at > SAME_S:
            if not self.is_ending:
                self._say(f"{number.name}: ended at once; the same command resumes from the last checkpoint")
            os._exit(self.status_at_once)

    def _say_first(self) -> None:
        """Say that the run will stop, if that takes a while. A rank that has lost the others ends before."""
        if self.first is not None and self.is_training and not self.is_ending and not self._is_said:
            self._is_said = True
            self._say(f"{self.first.name}: the run stops after this step and saves; a second signal ends it at once")

    def _end_if_not_interrupted(self) -> None:
        """End a process that was interrupted before training some time ago, and is still there."""
        if self.first is None or self.first_at is None or not self._interrupts or self.is_training or self.is_ending:
            return
        if time.monotonic() - self.first_at > INTERRUPTION_S:
            self._say(f"{self.first.name}: {INTERRUPTED}")
            os._exit(interrupted_status(self.first.name))

    def _say(self, text: str) -> None:
        if self._is_main:
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"{text}\n".encode())


_signals: Signals | None = None


@contextmanager
def signals_kept(*, is_main: bool) -> Iterator[None]:
    """Handle signals as `Signals` does, in the main thread. Processes that this one forks handle them as usual."""
    global _signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = _signals = Signals(is_main=is_main)
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = {number: signal.signal(number, signals.on_signal) for number in handled_signals()}
    before_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=signals.watch, args=(receiver,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _signals = None
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if signals.is_ending else handler)
        sender.shutdown(socket.SHUT_RDWR)  # not just closed: forked processes have it too
        thread.join()
        sender.close()
        receiver.close()


def _forget() -> None:
    """Let a forked process, such as one that loads data, do what it would do without us."""
    global _signals
    if _signals is not None:
        _signals = None
        signal.set_wakeup_fd(-1)
        for number in handled_signals():
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


@contextmanager
def until_the_end_of_a_step() -> Iterator[None]:
    """Keep signals until the run asks for them at the end of a step."""
    signals = _signals
    if signals is None:
        yield
        return
    signals.is_training = True
    try:
        yield
    finally:
        signals.is_training = False


class Asked(NamedTuple):
    """What a rank, or any rank, has been asked for."""

    stop: bool = False
    save: bool = False


class Requests:
    """What this rank is asked for: by a signal, by the end of its time, or by files in the output folder."""

    def __init__(self, folders: Sequence[Path] = (), time_left: TimeLeft | None = None) -> None:
        """`folders` are set on the rank that looks for the files."""
        self.time_left = time_left or TimeLeft()
        self._folders = folders
        self._looked_at = 0.0
        self._files: set[Path] = set()
        self._is_time_over = False
        self._is_asked = False

    def stop(self) -> None:
        """Ask all ranks to stop at the end of the next step."""
        self._is_asked = True

    def now(self) -> Asked:
        """Return what this rank is asked for."""
        if self._folders and time.monotonic() - self._looked_at > POLL_INTERVAL_S:
            self._looked_at = time.monotonic()
            both = (folder / name for folder in self._folders for name in (STOP_FILE, SAVE_FILE))
            self._files = {path for path in both if os.path.lexists(path)}
        self._is_time_over = self._is_time_over or self.time_left.is_over()
        names = {path.name for path in self._files}
        return Asked(
            stop=_first_at() is not None or self._is_time_over or self._is_asked or STOP_FILE in names,
            save=SAVE_FILE in names or (bool(self._folders) and self.time_left.is_save_due()),
        )

    def may_finish_step(self) -> bool:
        """Return whether the current step can be finished and saved in the time that is left."""
        return not self.time_left.is_short(_first_at())

    def met(self) -> str:
        """Remove the files, whose requests are met, and return what asked for it."""
        is_by_file = STOP_FILE in {path.name for path in self._files}
        for path in self._files:
            with suppress(OSError):
                retried(partial(path.unlink, missing_ok=True))
        self._files = set()
        if _signals is not None and _signals.first is not None:
            return _signals.first.name
        if is_by_file:
            return f"the file {STOP_FILE}"
        return self.time_left.end_source if self._is_time_over else "a signal to another rank"


class Polls:
    """Agreement of the ranks while a step or an evaluation lasts long: about once per second, and never if it is short.

    The ranks count their calls, and share how long the last ones took: all of them choose the same call to meet at.
    """

    def __init__(self, peers: Peers, must_break_off: Callable[[], bool]) -> None:
        self._peers = peers
        self._must_break_off = must_break_off
        self.begin()

    def begin(self) -> None:
        """Meet at the next call, and then again after as many as take a second. All ranks."""
        self._left = self._interval = 1
        self._met_at = time.monotonic()

    def __call__(self) -> None:
        """Raise BrokenOff if any rank must break off. All ranks, equally often."""
        self._left -= 1
        if self._left:
            return
        elapsed_ms = int(1000 * (time.monotonic() - self._met_at))
        slowest_ms, must_break_off = self._peers.most([elapsed_ms, self._must_break_off()])
        self._met_at = time.monotonic()
        slowest_s = slowest_ms / 1000
        self._interval = max(1, min(4 * self._interval, int(self._interval * POLL_INTERVAL_S / max(slowest_s, 1e-3))))
        self._left = self._interval
        if must_break_off:
            raise BrokenOff


def _first_at() -> float | None:
    return _signals.first_at if _signals is not None else None


def raise_if_stopped(cause: str, step: int) -> None:
    """Raise Stopped if something asked for it; signals are ignored from now on."""
    if cause:
        nothing_left_to_stop(EXIT_STOPPED)
        raise Stopped(cause, step)


def nothing_left_to_stop(status: int) -> None:
    """Ignore a first signal from now on: a launcher sends one to the ranks that end a little later than the others.

    A second one ends the process with `status`, which it would have soon.
    """
    if _signals is not None:
        _signals.is_ending, _signals.first_at, _signals.status_at_once = True, None, status

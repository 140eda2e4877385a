"""Stop a run in time: a signal or a file asks for it, all ranks agree at the end of a step, which is saved."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from shardlaunch.checkpoints.files import retried
from shardlaunch.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE, SAVE_FILE = "stop", "save-now"
POLL_INTERVAL_S = 1.0  # an output folder may be on a network
SAME_S = 1.0  # a launcher and a cluster may both pass on one signal


class Stopped(Exception):
    """The run has stopped before its end because it was asked to, and its state is saved."""

    def __init__(self, cause: str, step: int) -> None:
        super().__init__(f"{cause}: stopped after step {step}, which is saved; the same command goes on from there")


class Signals:
    """Signals to this process. During training the first one is kept for the end of the step.

    A second one ends the process at once, also while it waits for another rank. Before and after training the first
    one interrupts.
    """

    def __init__(self, *, is_main: bool) -> None:
        self.first: signal.Signals | None = None
        self.is_training = False
        self.is_ending = False
        self._is_main = is_main
        self._first_at = 0.0
        self._is_said = False

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
                continue
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS and self.is_training and not self.is_ending:
                    self._keep(signal.Signals(number))

    def _keep(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._first_at = number, now
        elif now - self._first_at > SAME_S:
            self._say(f"{number.name}: ended at once; the same command resumes from the last checkpoint")
            os._exit(EXIT_INTERRUPTED)

    def _say_first(self) -> None:
        """Say that the run will stop, if that takes a while. A rank that has lost the others ends before."""
        if self.first is not None and self.is_training and not self.is_ending and not self._is_said:
            self._is_said = True
            self._say(f"{self.first.name}: the run stops after this step and saves; a second signal ends it at once")

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
    before = {number: signal.signal(number, signals.on_signal) for number in SIGNALS}
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
        for number in SIGNALS:
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
    """What this rank is asked for: by a signal, or by files in the output folder."""

    def __init__(self, output_dir: Path | None = None) -> None:
        """`output_dir` is set on the rank that looks for the files."""
        self._output_dir = output_dir
        self._looked_at = 0.0
        self._files: set[str] = set()

    def now(self) -> Asked:
        """Return what this rank is asked for."""
        if self._output_dir is not None and time.monotonic() - self._looked_at > POLL_INTERVAL_S:
            self._looked_at = time.monotonic()
            self._files = {name for name in (STOP_FILE, SAVE_FILE) if os.path.lexists(self._output_dir / name)}
        is_signalled = _signals is not None and _signals.first is not None
        return Asked(stop=is_signalled or STOP_FILE in self._files, save=SAVE_FILE in self._files)

    def met(self) -> str:
        """Remove the files, whose requests are met, and return what asked for it."""
        cause = f"the file {STOP_FILE}" if STOP_FILE in self._files else "a signal to another rank"
        for name in self._files:
            assert self._output_dir is not None
            path = self._output_dir / name
            with suppress(OSError):
                retried(partial(path.unlink, missing_ok=True))
        self._files = set()
        return _signals.first.name if _signals is not None and _signals.first is not None else cause


def raise_if_stopped(cause: str, step: int) -> None:
    """Raise Stopped if something asked for it; signals are ignored from now on.

    A launcher sends one to the ranks that have not ended yet as soon as the first has.
    """
    if cause:
        if _signals is not None:
            _signals.is_ending = True
        raise Stopped(cause, step)

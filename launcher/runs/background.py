"""One piece of work at a time beside the training, in a thread of its own, and what it has to say."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from shardlaunch.progress import progress

LEAST_PRIORITY = 19  # of Unix: a thread with it gets what others leave, and all of a core that is idle


def lower_priority() -> None:
    """Let the thread that calls this, and those that it starts, give way to all others where cores are short.

    On Linux only, where each thread has a priority of its own; elsewhere it is the process's. Raising it again takes
    a privilege, so this is for threads whose work is never urgent: a main thread that waits for it leaves its core.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it; then steps are slower while the thread works
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)


class Messages:
    """Passes messages on: those of other threads when the thread that has made this looks for them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._thread = threading.current_thread()
        self._waiting: deque[str] = deque()

    def __call__(self, text: str) -> None:
        """Say a message, or keep it until `flush`."""
        if threading.current_thread() is self._thread:
            self._say(text)
        else:
            self._waiting.append(text)

    def flush(self) -> None:
        """Say what waits."""
        while self._waiting:
            self._say(self._waiting.popleft())


class Background:
    """Does one piece of work at a time in a thread, while the main thread trains."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_awaited = False

    @property
    def is_busy(self) -> bool:
        """Return whether there is work whose end `wait` has not seen."""
        return self._thread is not None

    @property
    def is_done(self) -> bool:
        """Return whether there is work that has ended, so that `wait` takes no time."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, work: Callable[[], None], *, name: str) -> None:
        """Begin with a piece of work, after the one before has been waited for."""
        assert self._thread is None

        def run() -> None:
            lower_priority()
            try:
                work()
            except BaseException as error:  # raised again by `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Note that the work has come further, for the watchdog of a main thread that waits for it."""
        if self._is_awaited:
            progress.advance()

    def wait(self) -> None:
        """Wait for the work, if there is any, and raise what it has raised."""
        if self._thread is None:
            return
        self._is_awaited = True
        try:
            self._thread.join()
        finally:
            self._is_awaited = False
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

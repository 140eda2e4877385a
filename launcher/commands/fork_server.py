"""The process from which the ranks of a run on the CPU are forked: it loads the libraries once, for all of them.

Forked before the agent has threads, since a process with threads cannot be forked safely. On GPUs each rank starts
anew: CUDA does not survive a fork.
"""

import ast
import gc
import importlib
import io
import os
import selectors
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from threadpoolctl import threadpool_limits
from torch.distributed.elastic.multiprocessing.subprocess_handler import get_subprocess_handler

from shardlaunch.launcher.training.stopping import handled_signals

IS_POSSIBLE = sys.platform == "linux"  # pidfd_open, and libraries that survive a fork
_POLL_S = 0.05
# Of what a recipe imports: these do nothing of their own as they are loaded.
_LIBRARIES = (
    *("accelerate", "datasets", "numpy", "pandas", "peft", "scipy", "shardlaunch"),
    *("sklearn", "tokenizers", "torch", "torchmetrics", "torchvision", "transformers"),
)
_EVERY_RUN = (
    "accelerate",
    "shardlaunch.launcher.launch",
    "shardlaunch.launcher.reporting.display",
    "shardlaunch.launcher.runs.fit",
    "shardlaunch.launcher.runs.run",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
_ON_USE = {  # what modules of ours load once they are used
    "shardlaunch.data": ("datasets",),
    "shardlaunch.metrics": ("torchmetrics.classification",),
    "shardlaunch.text": ("transformers.modeling_utils", "transformers.models.auto.modeling_auto"),
}


class ForkServer:
    """Forks ranks, and says how they have ended."""

    def __init__(self, recipe: Path) -> None:
        """Load what a recipe file imports, and fork the process that forks its ranks."""
        self._ended: dict[int, int] = {}
        self._running: set[int] = set()
        _load(recipe)
        ours, its = Pipe(duplex=True)
        _flush()
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _serve(its)
        its.close()
        self._connection = ours

    def close(self) -> None:
        """End the server, once its ranks have ended: those that have not are asked to stop."""
        self._connection.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    @property
    def running(self) -> list[int]:
        """The process ids of the ranks of which it is not known that they have ended. May be asked in a handler."""
        return sorted(self._running)

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start `python words...` with just this environment, in a session of its own. Return its process id.

        Raises EOFError or OSError if the server was killed, or has no memory or process for it.
        """
        former = signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals())  # a handler must find the rank in the list
        try:
            self._connection.send((list(words), dict(environment)))
            pid = self._connection.recv()
            while isinstance(pid, tuple):
                self._note(*pid)
                pid = self._connection.recv()
            if isinstance(pid, OSError):
                raise pid
            self._running.add(pid)
            return int(pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def status(self, pid: int) -> int | None:
        """Return the exit status of a rank, minus the number of the signal that ended it, or None while it runs."""
        self._hear()
        return self._ended.get(pid)

    def _hear(self) -> None:
        try:
            while self._running and self._connection.poll():
                self._note(*self._connection.recv())
        except (EOFError, ConnectionError):  # the server was killed: its ranks are out of reach
            for pid in list(self._running):
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                self._note(pid, -signal.SIGKILL)

    def _note(self, pid: int, status: int) -> None:
        self._ended[pid] = status
        self._running.discard(pid)


class ForkedRank:
    """A rank, as torch's agent wants it: with the methods of a `subprocess.Popen` that it calls."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.proc = self

    def poll(self) -> int | None:
        """Return the exit status, or None while the rank runs."""
        return self._server.status(self.pid)

    def wait(self, timeout: float) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(_POLL_S)
        return status

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Send a signal to the rank and to what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, death_sig or signal.SIGTERM)


def start_rank(server: ForkServer, entrypoint: str, args: Sequence[str], env: dict[str, str], **its_own: Any) -> Any:
    """Start a rank, in the place of torch's function: by the fork server, unless that was killed."""
    assert args[0] == "-u"
    with suppress(EOFError, OSError):
        return ForkedRank(server, server.start(args[1:], {**os.environ, **env}))
    return get_subprocess_handler(entrypoint=entrypoint, args=tuple(args), env=env, **its_own)


def _load(recipe: Path) -> None:
    """Load the libraries that a recipe imports and those of every run; what fails, the rank will say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, names in [*_imports(recipe), *((name, []) for name in _EVERY_RUN)]:
            with suppress(Exception):
                loaded = importlib.import_module(module)
                for name in names:  # some modules load what they have on use
                    getattr(loaded, name, None)
                for other in _ON_USE.get(module, ()):
                    importlib.import_module(other)
    gc.collect()
    gc.freeze()  # a rank need not look through what is loaded, nor copy its pages


def _imports(recipe: Path) -> list[tuple[str, list[str]]]:
    """Return the modules of known libraries that a file imports anywhere, with the names that it takes of each."""
    try:
        tree = ast.parse(recipe.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found: list[tuple[str, list[str]]] = []
    for each in ast.walk(tree):
        if isinstance(each, ast.Import):
            found += [(name.name, []) for name in each.names]
        elif isinstance(each, ast.ImportFrom) and each.module and not each.level:
            found.append((each.module, [name.name for name in each.names]))
    return [(module, names) for module, names in found if module.partition(".")[0] in _LIBRARIES]


def _serve(connection: Connection) -> NoReturn:
    """Fork ranks when asked to, until the agent is gone and all have ended. The process that this runs in ends here.

    A rank, which is forked here too, leaves with the recipe's own SystemExit.
    """
    os.setsid()  # signals from the terminal are for the agent, which passes them on
    signals = handled_signals()
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    request = _forked(connection)
    if request is None:
        os._exit(0)
    for number in signals:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _run(*request)


def _forked(connection: Connection) -> tuple[list[str], dict[str, str]] | None:
    """Fork ranks. Return in each of them what it is to run, and None in the server once it is done."""
    ranks: dict[int, int] = {}  # process ids by the descriptors that tell of their ends
    is_alone = False
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while ranks or not is_alone:
            for key, _ in selector.select():
                if key.fileobj is not connection:
                    selector.unregister(key.fd)
                    _tell_end(connection, key.fd, ranks.pop(key.fd))
                elif (request := _received(connection)) is None:  # the agent was killed
                    is_alone = True
                    selector.unregister(connection)
                    _stop(ranks.values())
                elif (pid := _fork(connection)) == 0:
                    connection.close()
                    for descriptor in ranks:
                        os.close(descriptor)
                    return request
                elif pid is not None:
                    descriptor = os.pidfd_open(pid)
                    ranks[descriptor] = pid
                    selector.register(descriptor, selectors.EVENT_READ)
                    connection.send(pid)
    return None


def _tell_end(connection: Connection, descriptor: int, pid: int) -> None:
    """Tell the agent how a rank has ended, if it is there."""
    os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        connection.send((pid, status))


def _received(connection: Connection) -> tuple[list[str], dict[str, str]] | None:
    """Return what the agent asks for, or None if it is gone."""
    try:
        request: tuple[list[str], dict[str, str]] = connection.recv()
        return request
    except (EOFError, OSError):
        return None


def _stop(ranks: Iterable[int]) -> None:
    """Ask ranks to stop in time, with a save."""
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _fork(connection: Connection) -> int | None:
    """Fork, or tell the agent that there is no memory or process for it, and return None."""
    try:
        return os.fork()
    except OSError as error:
        connection.send(error)
        return None


def _run(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Do in this process what `python -u words...` would do in one of its own, with just this environment."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    threads = int(environment["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    threadpool_limits(limits=threads)
    sys.stdout, sys.stderr = (_unbuffered(stream) for stream in (sys.stdout, sys.stderr))
    script = words[0]
    sys.argv = list(words)
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    try:
        exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # from the recipe on
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None
    raise SystemExit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed: None
            stream.flush()


def _unbuffered(stream: TextIO | None) -> Any:
    if stream is None:  # it was closed when Python started
        return None
    raw = io.FileIO(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True)

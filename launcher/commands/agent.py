"""The process that starts the ranks of this machine, passes signals on, and restarts a run that has lost one."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api as elastic
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from shardlaunch.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_OTHER_ERROR, EXIT_STOPPED, EXIT_USER_ERROR
from shardlaunch.launcher.commands.fork_server import ForkServer, start_rank
from shardlaunch.launcher.training.stopping import handled_signals
from shardlaunch.sharding.environment import PROGRESS_VARIABLE, RANKS_VARIABLE, STRATEGY_VARIABLE
from shardlaunch.sharding.resolve import fitting

_FINAL = (EXIT_USER_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED)  # of a run that a restart would not help, or must not
_ALWAYS = 1_000_000  # restarts that torch counts; how many there may be is decided here
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


class Restarts:
    """Decides whether a run that has failed starts again, and on how many ranks of this machine.

    Failures are counted since the last one before which a checkpoint was saved. A run that fails twice without has one
    rank fewer each time, as long as `min_ranks` allows: what killed it may be the memory of the machine.
    """

    def __init__(self, most: int, *, ranks: int, min_ranks: int, uses_gpus: bool, saves: Path) -> None:
        """`saves` is a file to which the ranks add a byte per checkpoint."""
        self.most = most
        self.ranks = self.max_ranks = ranks
        self.min_ranks = min_ranks
        self.why_none = ""
        self._uses_gpus = uses_gpus
        self._saves = saves
        self._num_saved = 0
        self._num_failed = 0  # since then

    def allows(self, failures: Sequence[ProcessFailure]) -> bool:
        """Return whether to start again after these failures of ranks of this machine, on `ranks` of them."""
        if not self.most:
            return False
        if any(failure.exitcode in _FINAL for failure in failures):
            return False
        num_saved = self._saves.stat().st_size if self._saves.exists() else 0
        has_progress = num_saved > self._num_saved
        self._num_saved = num_saved
        self._num_failed = 1 if has_progress else self._num_failed + 1
        if self._num_failed > self.most:
            self.why_none = f"failed {self._num_failed} times without a new checkpoint between"
            return False
        fewer = max(0, self._num_failed - 1)
        ranks = max(self.min_ranks, self.max_ranks - fewer)
        if self._uses_gpus:
            num_gpus = _count_gpus()
            if num_gpus < self.min_ranks:
                self.why_none = f"{num_gpus} GPUs are left; at least {self.min_ranks} ranks are needed (--min-ranks)"
                return False
            ranks = min(ranks, num_gpus)
        self.ranks = ranks
        return True

    def text(self, failures: Sequence[ProcessFailure]) -> str:
        """Describe the restart after these failures."""
        # Those that have lost contact with another are not the cause.
        first = min(failures, key=lambda failure: (failure.exitcode == EXIT_OTHER_ERROR, failure.timestamp))
        how = f"ended with status {first.exitcode}"
        if first.exitcode < 0:
            how = f"was killed ({signal.Signals(-first.exitcode).name})"
        count = f"restart {self._num_failed} of {self.most} without a new checkpoint between"
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        fewer = f" of {self.max_ranks}" if self.ranks < self.max_ranks else ""
        return f"rank {first.local_rank} of this machine {how}; the run starts again on {ranks}{fewer}: {count}"


class Agent(LocalElasticAgent):
    """torch's agent, which asks `restarts` when ranks have failed."""

    def __init__(self, restarts: Restarts, **its_own: Any) -> None:
        super().__init__(**its_own)
        self._restarts = restarts
        self._strategy = os.environ.get(STRATEGY_VARIABLE)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            failures = list(result.failures.values())
            if self._restarts.allows(failures):
                print(self._restarts.text(failures), file=sys.stderr, flush=True)
                worker_group.spec.local_world_size = self._restarts.ranks
                self._set_environment(self._restarts.ranks)
            else:
                self._remaining_restarts = 0
        return result

    def _set_environment(self, ranks: int) -> None:
        if RANKS_VARIABLE in os.environ:
            os.environ[RANKS_VARIABLE] = str(ranks)
        if self._strategy:
            name = os.environ[STRATEGY_VARIABLE] = fitting(self._strategy, ranks)
            if name != self._strategy:
                print(f"{self._strategy} cannot divide {ranks} ranks into replicas: under {name}", file=sys.stderr)


def run_agent(
    argv: list[str],
    *,
    ranks: int,
    max_restarts: int = 0,
    min_ranks: int = 0,
    uses_gpus: bool = False,
    fork_server: ForkServer | None = None,
) -> int:
    """Do what the torchrun command does, without its own error report: the ranks print theirs. Return the exit status.

    A run that fails starts again up to `max_restarts` times without a new checkpoint between, on at least `min_ranks`
    ranks (0: as many as before). With a `fork_server` it starts them.
    """
    passed_on = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal passed_on
        children = fork_server.running if fork_server else [child.pid for child in psutil.Process().children()]
        if not children:  # not yet, or no longer
            raise KeyboardInterrupt
        passed_on = True
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, number)

    logging.disable(logging.CRITICAL)  # in this process only, not in the ranks
    # torch's agent would end the ranks 30 s after the signal, however long a step and a save take.
    for number in handled_signals():
        signal.signal(number, pass_on)
    with TemporaryDirectory() as folder:
        saves = Path(folder) / "saves"
        os.environ[PROGRESS_VARIABLE] = str(saves)
        restarts = Restarts(max_restarts, ranks=ranks, min_ranks=min_ranks or ranks, uses_gpus=uses_gpus, saves=saves)
        # torch makes its agent in a function that cannot be given another.
        api.LocalElasticAgent = partial(Agent, restarts)  # type: ignore[misc, assignment]
        if fork_server is not None:
            elastic.get_subprocess_handler = partial(start_rank, fork_server)
        words = ["--signals-to-handle", "SIGQUIT", "--max-restarts", str(_ALWAYS if max_restarts else 0), *argv]
        try:
            run.run(run.parse_args(words))
        except ChildFailedError as error:
            if restarts.why_none:
                print(f"error: {restarts.why_none}; the messages above say why", file=sys.stderr, flush=True)
            codes = [failure.exitcode for failure in error.failures.values()]
            # Negative codes are of ranks that a signal ended, mostly the agent's: a rank's own exit status tells more.
            own = EXIT_HUNG if EXIT_HUNG in codes else next((code for code in codes if code > 0), None)
            return own or (EXIT_STOPPED if passed_on else 128 + abs(codes[0]))
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:  # the status is known: a later signal must not end this process with another one as it exits
            for number in handled_signals():
                signal.signal(number, signal.SIG_IGN)
    return 0


def _count_gpus() -> int:
    """Return how many GPUs work now. Another process, since torch counts once per process."""
    done: Any = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0

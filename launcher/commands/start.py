"""Start a recipe file on several processes of this machine: `shardlaunch run`, and `start` for notebooks."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil
import torch

from shardlaunch.errors import EXIT_HUNG, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from shardlaunch.launcher.runs.result import Result
from shardlaunch.launcher.training.stopping import SIGNALS
from shardlaunch.sharding.environment import (
    RANKS_VARIABLE,
    RESULT_VARIABLE,
    STRATEGY_VARIABLE,
    is_distributed_launch,
    read_environment,
)
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name
from shardlaunch.sharding.world import available_cores

COMMAND = (sys.executable, "-c", "from shardlaunch.launcher.commands.main import main; main()")
MOST_QUOTED = 2000  # characters of what a failed run printed


def run_recipe(recipe: Path, recipe_argv: Sequence[str], *, ranks: int, strategy: str) -> int:
    """Start a recipe on `ranks` processes of this machine, print the command, and return its exit status.

    Without a GPU, the ranks use the CPU and divide its cores. Raises UserError for an unknown strategy, and for more
    ranks than the strategy or the machine supports.
    """
    if ranks < 0:
        raise UserError(f"--ranks {ranks}: must be at least 1, or 0 for one per GPU")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() and not read_environment().use_cpu else 0
    if strategy != "auto":
        check_strategy_name(strategy, f"--strategy {strategy}")
    for_one_process = strategy != "auto" and STRATEGIES[strategy].for_one_process
    if for_one_process and ranks > 1:
        raise UserError(f"--strategy {strategy} is for one process, not --ranks {ranks}")
    ranks = ranks or (1 if for_one_process else max(1, num_gpus))
    if num_gpus and ranks > num_gpus:
        raise UserError(
            f"--ranks {ranks}: this machine has {num_gpus} GPUs. Start at most one rank per GPU, "
            f"or set ACCELERATE_USE_CPU=true."
        )
    environment = {RANKS_VARIABLE: str(ranks)}
    if strategy != "auto":
        environment[STRATEGY_VARIABLE] = strategy
    if not num_gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["OMP_NUM_THREADS"] = str(max(1, available_cores() // ranks))
    # --standalone chooses a free port, so that several runs can share a machine; a numeric address needs no host name.
    agent_argv = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    worker_argv = [str(recipe), *recipe_argv]
    settings = [f"{name}={value}" for name, value in environment.items()]
    print(f"$ {shlex.join([*settings, 'torchrun', *agent_argv, *worker_argv])}", flush=True)
    os.environ.update(environment)
    return _run_agent([*agent_argv, *worker_argv])


def _run_agent(argv: list[str]) -> int:
    """Do what the torchrun command does, without its own error report: the ranks print theirs."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    passed_on = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal passed_on
        ranks = psutil.Process().children()
        if not ranks:  # not yet, or no longer
            raise KeyboardInterrupt
        passed_on = True
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    logging.disable(logging.CRITICAL)  # in this process only, not in the ranks
    # torch's agent would end the ranks 30 s after the signal, however long a step and a save take.
    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        run.run(run.parse_args(["--signals-to-handle", "SIGHUP,SIGQUIT", *argv]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # Negative codes are of ranks that a signal ended, mostly the agent's: a rank's own exit status tells more.
        own = EXIT_HUNG if EXIT_HUNG in codes else next((code for code in codes if code > 0), None)
        return own or (EXIT_STOPPED if passed_on else 128 + abs(codes[0]))
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def start(recipe: str | Path, *, ranks: int = 0, strategy: str = "auto", show: bool = False, **options: Any) -> Result:
    """Train a recipe on several processes of this machine, as `shardlaunch run` does, and return the outcome.

    For notebooks and scripts. `recipe` is a recipe file or the name of an installed recipe; `options` are its
    command-line options by their Python names. With `show`, prints the run's output as it comes. Raises UserError for
    errors that the user can fix and RuntimeError for other failures; an interrupt ends the run and is raised again.
    """
    if is_distributed_launch():
        raise UserError(
            "start() starts several processes, but this process is already one of several: call fit() instead"
        )
    with TemporaryDirectory() as folder:
        result_path, error_path = Path(folder) / "result.json", Path(folder) / "stderr"
        words = ["run", str(recipe), "--ranks", str(ranks), "--strategy", strategy, "--", *option_words(options)]
        environment = {**os.environ, RESULT_VARIABLE: str(result_path)}
        with (
            open(error_path, "w") as error_file,
            # A new session, so that an interrupt reaches only this process, which passes it on once.
            subprocess.Popen(
                [*COMMAND, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=error_file,
                text=True,
                start_new_session=True,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if show:
                        print(line, end="", flush=True)
                status = process.wait()
            except BaseException:
                process.send_signal(signal.SIGINT)
                process.wait()
                raise
        message = error_path.read_text(errors="replace").strip()
        if status == EXIT_USER_ERROR:
            raise UserError(re.split(r"^error: ", message, maxsplit=1, flags=re.M)[-1] or f"{recipe}: refused")
        if status:
            raise RuntimeError(f"{recipe} ended with status {status}: {message[-MOST_QUOTED:] or 'no message'}")
        return Result.of_folder(Path(json.loads(result_path.read_text())["run_dir"]))


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return options, by their Python names, as command-line words; None means the default."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        elif value is not None:
            words.append(f"{flag}={value}")
    return words

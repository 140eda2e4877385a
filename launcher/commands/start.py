"""Start a recipe file on several processes of this machine: `shardlaunch run`, and `start` for notebooks."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from shardlaunch.errors import EXIT_USER_ERROR, UserError
from shardlaunch.launcher.runs.result import Result
from shardlaunch.sharding.clusters import LAUNCHER_VARIABLE
from shardlaunch.sharding.environment import (
    RANKS_VARIABLE,
    RESULT_VARIABLE,
    STRATEGY_VARIABLE,
    is_distributed_launch,
    one_of_several_launchers,
    read_environment,
)
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name
from shardlaunch.sharding.world import available_cores

COMMAND = (sys.executable, "-c", "from shardlaunch.launcher.commands.main import main; main()")
LAST_CALL_S = 10  # how long the least number of machines waits for more
KEEP_ALIVE_S = 2  # a machine that has been silent for three times as long is lost
MOST_QUOTED = 2000  # characters of what a failed run printed


def run_recipe(
    recipe: Path,
    recipe_argv: Sequence[str],
    *,
    ranks: int,
    strategy: str,
    max_restarts: int = 0,
    min_ranks: int = 0,
    hosts: str = "",
    rendezvous: str = "",
) -> int:
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
    if max_restarts < 0:
        raise UserError(f"--max-restarts {max_restarts}: must be at least 0")
    if not 0 <= min_ranks <= ranks:
        raise UserError(f"--min-ranks {min_ranks}: must be from 1 to --ranks, {ranks}, or 0 for always {ranks}")
    if min_ranks and not max_restarts:
        raise UserError("--min-ranks: needs --max-restarts, since nothing is started again without")
    environment = {}
    if not hosts and (warning := one_of_several_launchers()):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    os.environ.pop(LAUNCHER_VARIABLE, None)  # it is about this process; the ranks are started by this one
    if not hosts:
        environment[RANKS_VARIABLE] = str(ranks)
    if strategy != "auto":
        environment[STRATEGY_VARIABLE] = strategy
    if not num_gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["OMP_NUM_THREADS"] = str(max(1, available_cores() // ranks))
    agent_argv = [*_meeting_words(hosts, rendezvous), "--nproc-per-node", str(ranks)]
    if hosts:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a shared one holds what lost ranks have written
    worker_argv = [str(recipe), *recipe_argv]
    settings = [f"{name}={value}" for name, value in environment.items()]
    print(f"$ {shlex.join([*settings, 'torchrun', *agent_argv, *worker_argv])}", flush=True)
    os.environ.update(environment)
    from shardlaunch.launcher.commands.agent import run_agent
    from shardlaunch.launcher.commands.fork_server import IS_POSSIBLE, ForkServer

    fork_server = ForkServer(recipe) if IS_POSSIBLE and not num_gpus else None
    try:
        return run_agent(
            [*agent_argv, *worker_argv],
            ranks=ranks,
            max_restarts=max_restarts,
            min_ranks=min_ranks,
            uses_gpus=bool(num_gpus),
            fork_server=fork_server,
        )
    finally:
        if fork_server is not None:
            fork_server.close()


def _meeting_words(hosts: str, rendezvous: str) -> list[str]:
    """Return torchrun's words for where the agents of all machines meet. Raises UserError if they are contradictory."""
    if not hosts:
        if rendezvous:
            raise UserError(f"--rendezvous {rendezvous}: needs --hosts, the number of machines")
        # A free port, so that several runs can share a machine; a numeric address needs no host name.
        return ["--standalone", "--local-addr", "127.0.0.1"]
    least, _, most = hosts.partition(":")
    most = most or least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise UserError(f"--hosts {hosts}: must be the number of machines, or the least and the most, such as 1:4")
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError("--hosts: needs --rendezvous HOST:PORT, the same on all machines, where one of them listens")
    timeouts = f"last_call_timeout={LAST_CALL_S},keep_alive_interval={KEEP_ALIVE_S}"
    return [
        *("--nnodes", f"{least}:{most}", "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous),
        *("--rdzv-conf", timeouts),
    ]


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

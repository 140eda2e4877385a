"""Start a recipe file on several processes of this machine, by torchrun's agent."""

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from shardlaunch.errors import UserError
from shardlaunch.sharding.environment import RANKS_VARIABLE, STRATEGY_VARIABLE, read_environment
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name
from shardlaunch.sharding.world import available_cores


def run_recipe(recipe: Path, recipe_argv: Sequence[str], *, ranks: int, strategy: str) -> int:
    """Start a recipe on `ranks` processes of this machine, print the command, and return its exit status.

    On machines without a GPU the ranks are told to use the CPU and share its cores. Raises UserError for an
    unknown strategy, and for more ranks than the strategy or the machine has room for.
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
        raise UserError(f"--ranks {ranks}: this machine has {num_gpus} GPUs. Start as many ranks, or hide the GPUs.")
    environment = {RANKS_VARIABLE: str(ranks)}
    if strategy != "auto":
        environment[STRATEGY_VARIABLE] = strategy
    if not num_gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["OMP_NUM_THREADS"] = str(max(1, available_cores() // ranks))
    # A port of its own, so that several runs fit on a machine; by number, so that its name need not be known to it.
    agent_argv = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    worker_argv = [str(recipe), *recipe_argv]
    settings = [f"{name}={value}" for name, value in environment.items()]
    print(f"$ {shlex.join([*settings, 'torchrun', *agent_argv, *worker_argv])}", flush=True)
    os.environ.update(environment)
    return _run_agent([*agent_argv, *worker_argv])


def _run_agent(argv: list[str]) -> int:
    """Do what the torchrun command does, but leave the last word to the ranks' own message."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # in this process only: the ranks speak for themselves
    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # A rank that the agent ended (a negative code) says nothing of the cause when another has a status of its own.
        return next((code for code in codes if code > 0), None) or 128 + abs(codes[0])
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0

"""The console command `shardlaunch`: run a recipe on several ranks, compare strategies, use a checkpoint."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro

from shardlaunch.errors import UserError
from shardlaunch.launcher.generate import Sampling, generate_texts
from shardlaunch.launcher.launch import EXIT_INTERRUPTED, EXIT_USER_ERROR
from shardlaunch.launcher.parity import compare_strategies
from shardlaunch.launcher.predict import predict_texts
from shardlaunch.sharding.environment import RANKS_VARIABLE, STRATEGY_VARIABLE, read_environment
from shardlaunch.sharding.resolve import STRATEGIES, check_strategy_name
from shardlaunch.sharding.world import available_cores

_DESCRIPTION = f"""shardlaunch {version("shardlaunch")}: one run, any shards.

  shardlaunch run recipes/bert_imdb.py --ranks 2 -- --preset demo
  shardlaunch parity recipes/bert_imdb.py --ranks 2 --steps 20 -- --preset demo
  shardlaunch predict outputs/bert_imdb-demo --text "a wonderful film"
  shardlaunch generate outputs/gpt_lm-demo --prompt "The film" --temperature 0.8
"""


def main() -> None:
    """Run the command that the command line names and exit."""
    argv = sys.argv[1:]
    recipe_argv: list[str] = []
    if "--" in argv:
        position = argv.index("--")
        argv, recipe_argv = argv[:position], argv[position + 1 :]
    if argv in (["--version"], ["-V"]):
        print(f"shardlaunch {version('shardlaunch')}")
        return

    def run(recipe: tyro.conf.Positional[Path], ranks: int = 0, strategy: str = "auto") -> int:
        """Run a recipe file; what follows ` -- ` goes to the recipe.

        Args:
            recipe: The recipe's file.
            ranks: Processes to start on this machine; 0: one a GPU, or one where there is none.
            strategy: single, dp, ddp, fsdp2, hsdp, zero1, zero2, zero3, or auto: ddp on several ranks.
        """
        return run_recipe(recipe, recipe_argv, ranks=ranks, strategy=strategy)

    def parity(
        recipe: tyro.conf.Positional[Path],
        ranks: int = 2,
        steps: int = 20,
        strategies: tuple[str, ...] = (),
        tolerance: float = 1e-4,
    ) -> int:
        """Run a recipe for some steps under each strategy and show how far its losses and weights differ.

        What follows ` -- ` goes to the recipe. The exit status is 1 when a strategy failed or differs.

        Args:
            recipe: The recipe's file.
            ranks: Processes a strategy; the reference is a run on one.
            steps: Steps to run.
            strategies: Those to compare; none: all for several ranks.
            tolerance: The largest difference of a step's loss that counts as the same run.
        """
        return compare_strategies(
            recipe, recipe_argv, ranks=ranks, steps=steps, strategies=strategies, tolerance=tolerance
        )

    def predict(
        checkpoint: tyro.conf.Positional[Path],
        text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
        file: Path | None = None,
    ) -> int:
        """Print the label and the probabilities that a text classifier gives to texts.

        Args:
            checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
            text: Texts to classify.
            file: A file with one text a line.
        """
        if recipe_argv:
            raise UserError("predict takes nothing after ` -- `")
        predict_texts(checkpoint, texts=text, file=file)
        return 0

    def generate(
        checkpoint: tyro.conf.Positional[Path],
        prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
        file: Path | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int = 0,
        num_beams: int = 0,
        seed: int = 0,
    ) -> int:
        """Print texts of a language model: prompts and their continuations, or what an encoder-decoder makes of them.

        Args:
            checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
            prompt: Texts to begin with, or to translate or summarise.
            file: A file with one prompt a line.
            max_new_tokens: Tokens to write at most.
            temperature: Draw tokens at random, the higher the more freely; 0: take the most probable.
            top_k: Draw from so many most probable tokens; 0: from all.
            num_beams: Beams of a search for the most probable text; 0: as many as the checkpoint says, or one.
            seed: Decides what is drawn.
        """
        if recipe_argv:
            raise UserError("generate takes nothing after ` -- `")
        sampling = Sampling(temperature=temperature, top_k=top_k, num_beams=num_beams, seed=seed)
        generate_texts(checkpoint, prompts=prompt, file=file, max_new_tokens=max_new_tokens, sampling=sampling)
        return 0

    try:
        sys.exit(
            tyro.extras.subcommand_cli_from_dict(
                {"run": run, "parity": parity, "predict": predict, "generate": generate},
                prog="shardlaunch",
                description=_DESCRIPTION,
                args=argv,
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def run_recipe(recipe: Path, recipe_argv: Sequence[str], *, ranks: int, strategy: str) -> int:
    """Start a recipe on `ranks` processes of this machine, print the command, and return its exit status.

    On machines without a GPU the ranks are told to use the CPU and share its cores. Raises UserError for a recipe that
    is not there, an unknown strategy, and more ranks than the strategy or the machine has room for.
    """
    if not recipe.is_file() or recipe.suffix != ".py":
        raise UserError(f"{recipe}: no such recipe file (a Python file whose last line is `launch(YourRecipe)`)")
    if ranks < 0:
        raise UserError(f"--ranks {ranks}: must be at least 1, or 0 for one a GPU")
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

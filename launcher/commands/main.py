"""The console command `shardlaunch`: run a recipe on several ranks, compare strategies, use checkpoints."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import tyro

from shardlaunch.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from shardlaunch.launcher.commands.after_training import COMMANDS as AFTER_TRAINING
from shardlaunch.launcher.commands.installed import find_recipe, list_recipes
from shardlaunch.launcher.commands.searching import searching_commands
from shardlaunch.launcher.reporting.streams import open_closed_streams

_DESCRIPTION = f"""shardlaunch {version("shardlaunch")}: one run, any shards.

  shardlaunch recipes
  shardlaunch run bert_imdb --ranks 2 -- --preset demo
  shardlaunch run my_recipe.py --ranks 4 --strategy fsdp2
  shardlaunch parity bert_imdb --ranks 2 --steps 20 -- --preset demo
  shardlaunch parity my_recipe.py --exact --ranks 2,3,4
  shardlaunch parity --find my_recipe.py
  shardlaunch sweep bert_imdb --space space.yaml --trials 20 -- --preset demo
  shardlaunch predict outputs/bert_imdb-demo --text "a wonderful film"
  shardlaunch generate outputs/gpt_lm-demo --prompt "The film" --temperature 0.8
  shardlaunch evaluate outputs/bert_imdb-demo --data reviews.csv
  shardlaunch ckpt list outputs/bert_imdb-demo
  shardlaunch doctor bert_imdb --ranks 2 -- --preset demo
  shardlaunch plan gpt_lm --ranks 64 --gpu-memory 80 -- --preset demo
"""
_Recipe = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]

_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
_TOLERANCE = 1e-4


def main() -> None:
    """Run the command on the command line and exit.

    Each command imports what it needs, so that --help and refusals are fast.
    """
    open_closed_streams()
    argv = sys.argv[1:]
    recipe_argv: list[str] = []
    if "--" in argv:
        position = argv.index("--")
        argv, recipe_argv = argv[:position], argv[position + 1 :]
    if argv in (["--version"], ["-V"]):
        print(f"shardlaunch {version('shardlaunch')}")
        return

    def run(
        recipe: _Recipe,
        ranks: int = 0,
        strategy: str = "auto",
        max_restarts: int = 0,
        min_ranks: int = 0,
        hosts: str = "",
        rendezvous: str = "",
    ) -> int:
        """Run a recipe; words after ` -- ` are its options.

        Args:
            recipe: A recipe file, or the name of an installed recipe (see `shardlaunch recipes`).
            ranks: Number of processes on this machine (0: one per GPU, or one without GPUs).
            strategy: single, dp, ddp, fsdp2, hsdp, zero1, zero2, zero3, or auto (ddp on several ranks).
            max_restarts: How often in a row a run that fails starts again; a new checkpoint begins a new count.
            min_ranks: Least number of processes on this machine when some cannot be started again (0: all of them).
            hosts: Number of machines, or least and most (1:4); the same command runs on each.
            rendezvous: HOST:PORT where the machines meet; one of them is HOST.
        """
        path = find_recipe(recipe)
        from shardlaunch.launcher.commands.start import run_recipe

        return run_recipe(
            path,
            recipe_argv,
            ranks=ranks,
            strategy=strategy,
            max_restarts=max_restarts,
            min_ranks=min_ranks,
            hosts=hosts,
            rendezvous=rendezvous,
        )

    def recipes() -> int:
        """List the installed recipes with their presets."""
        refuse_recipe_words("recipes")
        list_recipes()
        return 0

    def parity(
        recipe: _Recipe,
        ranks: str = "",
        steps: int = 20,
        strategies: tuple[str, ...] = (),
        tolerance: float = _TOLERANCE,
        exact: _Flag = False,
        find: _Flag = False,
    ) -> int:
        """Run a few steps of a recipe under each strategy and compare losses and weights with one rank's.

        With --exact, compare every bit, and say what differs first; with --find, run twice in the same way, and say in
        which module the two differ first. Words after ` -- ` are options of the recipe. The exit status is 1 when a
        strategy failed or differs.

        Args:
            recipe: A recipe file, or the name of an installed recipe (see `shardlaunch recipes`).
            ranks: Number of processes per strategy, or several, such as 2,3,4 (empty: 2; with --find 1); the reference
                runs on one.
            steps: Number of steps.
            strategies: Strategies to compare (default: all that run on several ranks).
            tolerance: Largest difference of a step's loss that counts as the same run.
            exact: Run with --exact; print a digest per strategy and number of ranks, and where it differs the step,
                micro-batch, stage (forward, backward, sum, update), tensor and module that differ first.
            find: Run twice in the same way, and name the first module whose output or gradient differs.
        """
        if (exact or find) and (tolerance != _TOLERANCE or (exact and find)):
            other = "--find" if exact and find else "--tolerance"
            raise UserError(f"--{'exact' if exact else 'find'}: not with {other}; remove one of the two")
        path = find_recipe(recipe)
        from shardlaunch.launcher.commands.parity_runs import numbers_of_ranks

        counts = numbers_of_ranks(ranks or ("1" if find else "2"))
        if exact or find:
            from shardlaunch.launcher.commands.parity_bits import compare_bits, find_difference

            look = compare_bits if exact else find_difference
            return look(path, recipe_argv, ranks=counts, steps=steps, strategies=strategies)
        from shardlaunch.launcher.commands.parity import compare_strategies

        return compare_strategies(
            path, recipe_argv, ranks=counts, steps=steps, strategies=strategies, tolerance=tolerance
        )

    def ckpt() -> int:
        """List, verify, show, compare, export, average, prune and copy checkpoints; see `shardlaunch ckpt --help`."""
        refuse_recipe_words("ckpt")
        from shardlaunch.launcher.commands.ckpt.main import ckpt_command

        return ckpt_command(argv[1:])

    def doctor(
        recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = "",
        ranks: int = 0,
        strategy: str = "auto",
        measure: bool = True,
        network: bool = False,
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    ) -> int:
        """Say what this machine and its environment mean for `shardlaunch run` with the same words, before it runs.

        Checks variables, launchers, devices, network, disks, locks, versions and known traps, and measures the output
        folder's disk and sums between ranks, in 20 s at most. Each line is `ok`, `note` (may be meant) or `problem`
        (the command would fail, or do something else than was asked for), with what to do. Inside a launch (torchrun,
        srun) one rank per machine checks what is there, and no ranks are started.

        The exit status is 1 when there is a problem. Words after ` -- ` are options of the recipe.

        Args:
            recipe: A recipe file, or the name of an installed recipe; without one, its folder and size are not known.
            ranks: Number of processes on this machine (0: one per GPU, or two without GPUs).
            strategy: single, dp, ddp, fsdp2, hsdp, zero1, zero2, zero3, or auto (ddp on several ranks).
            measure: Measure disk and ranks.
            network: Ask the Hugging Face Hub whether it answers. Without it, nothing leaves this machine.
            as_json: Print one JSON document.
        """
        path = find_recipe(recipe) if recipe else None
        if path is None and recipe_argv:
            raise UserError("doctor: words after ` -- ` are options of a recipe, and none is given")
        from shardlaunch.launcher.commands.doctor.main import examine

        return examine(
            path, recipe_argv, ranks=ranks, strategy=strategy, measured=measure, network=network, as_json=as_json
        )

    def plan(
        recipe: _Recipe,
        ranks: int,
        gpus_per_node: int = 8,
        gpu_memory: float = 80.0,
        strategy: str = "auto",
        reserve: float = 2.0,
        tflops: float = 0.0,
        node_bandwidth: float = 300.0,
        network_bandwidth: float = 40.0,
        disk_bandwidth: float = 2.0,
        as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    ) -> int:
        """Say what a run would need on GPUs that need not be there: memory, traffic, times, and which strategy fits.

        Runs two steps of the recipe on tensors without values, as rank 0 of any number of ranks. Reads its data, but
        no weights, and trains nothing. Words after ` -- ` are options of the recipe.

        The exit status is 0 when a strategy fits, 1 when none does, 2 when the run would be refused.

        Args:
            recipe: A recipe file, or the name of an installed recipe (see `shardlaunch recipes`).
            ranks: Number of processes, one per GPU, on all machines.
            gpus_per_node: GPUs per machine.
            gpu_memory: GiB per GPU.
            strategy: single, ddp, fsdp2, hsdp, zero1, zero2, zero3, or auto (all that there are for the ranks).
            reserve: GiB per GPU that are not tensors: CUDA, NCCL, workspaces, gaps between tensors.
            tflops: TFLOP/s that a GPU reaches in training (0: 40 in fp32, 400 in bf16 and fp16, 600 in fp8).
            node_bandwidth: GB/s per GPU between the GPUs of a machine.
            network_bandwidth: GB/s per GPU between machines.
            disk_bandwidth: GB/s that all ranks together write to the file system.
            as_json: Print one JSON document.
        """
        path = find_recipe(recipe)
        from shardlaunch.launcher.commands.plan import plan_run
        from shardlaunch.launcher.planning.cluster import Cluster

        cluster = Cluster(
            ranks=ranks,
            gpus_per_node=gpus_per_node,
            gpu_gib=gpu_memory,
            reserve_gib=reserve,
            tflops=tflops,
            node_gbps=node_bandwidth,
            network_gbps=network_bandwidth,
            disk_gbps=disk_bandwidth,
        )
        return plan_run(path, recipe_argv, cluster, strategy=strategy, as_json=as_json)

    def refuse_recipe_words(command: str) -> None:
        if recipe_argv:
            raise UserError(f"{command}: takes no words after ` -- `; remove them")

    commands: dict[str, Callable[..., int]] = {
        "run": run,
        "recipes": recipes,
        "parity": parity,
        **searching_commands(recipe_argv),
        **AFTER_TRAINING,
        "ckpt": ckpt,
        "doctor": doctor,
        "plan": plan,
    }
    try:
        if argv and argv[0] in AFTER_TRAINING:
            refuse_recipe_words(argv[0])
        if argv[:1] == ["ckpt"]:  # it has commands of its own
            status = ckpt()
        else:
            status = tyro.extras.subcommand_cli_from_dict(
                commands, prog="shardlaunch", description=_DESCRIPTION, args=argv
            )
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # of a reader such as `head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)

"""The commands that search options of a recipe. Each imports what it needs when it is called."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from shardlaunch.launcher.commands.installed import find_recipe

_Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")]


def searching_commands(recipe_argv: Sequence[str]) -> dict[str, Callable[..., int]]:
    """Return the commands by name; `recipe_argv` are the words after ` -- `."""

    def sweep(
        recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE|DIR")],
        space: Path | None = None,
        trials: int = 20,
        at_once: int = 1,
        ranks: int = 0,
        strategy: str = "auto",
        max_restarts: int = 0,
        objective: str = "",
        direction: str = "auto",
        sampler: str = "tpe",
        pruner: str = "median",
        seed: int = 0,
        output_dir: Path | None = None,
        as_json: _Json = False,
    ) -> int:
        """Search the options of a recipe: run trials, each a run in its own folder, and show the best.

        The same command goes on with a sweep that was stopped or killed, running trials from their last checkpoints.
        With the folder of a sweep instead of a recipe, show what it has found. Words after ` -- ` are options of all
        trials.

        Args:
            recipe: A recipe file, the name of an installed recipe, or the folder of a sweep.
            space: YAML file of the options to search, each with a list of values or a range: low, high, log, step.
            trials: Number of trials, with those of earlier starts.
            at_once: Trials side by side, which share the cores or the GPUs.
            ranks: Processes per trial (0: one, or an equal share of the GPUs).
            strategy: Strategy of the trials, as of `shardlaunch run`.
            max_restarts: How often in a row a trial that fails starts again, as of `shardlaunch run`.
            objective: Metric of the evaluations (default: the recipe's best metric). With --folds, its mean over folds.
            direction: min or max (auto: as the metric says).
            sampler: tpe, random, or grid (all combinations).
            pruner: median, hyperband or none: which trials are stopped early, by their evaluations.
            seed: Random seed of the sampler.
            output_dir: Folder of the sweep (default: outputs/RECIPE-sweep, or RECIPE-PRESET-sweep).
            as_json: Print one JSON document at the end, and the lines before on stderr.
        """
        from shardlaunch.launcher.commands.sweep.main import Request
        from shardlaunch.launcher.commands.sweep.main import sweep as run_sweep

        request = Request(
            trials=trials,
            at_once=at_once,
            ranks=ranks,
            strategy=strategy,
            max_restarts=max_restarts,
            objective=objective,
            direction=direction,
            sampler=sampler,
            pruner=pruner,
            seed=seed,
            output_dir=output_dir,
            as_json=as_json,
        )
        return run_sweep(recipe, recipe_argv, space=space, request=request)

    def find_lr(
        recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")],
        ranks: int = 0,
        strategy: str = "auto",
        low: float = 1e-6,
        high: float = 10.0,
        steps: int = 100,
        output_dir: Path | None = None,
        as_json: _Json = False,
    ) -> int:
        """Suggest a learning rate: train a few steps at a rising rate, on the training data, and look at the loss.

        The rate rises by the same factor in each step, in place of --lr and the schedule, until the loss diverges.
        Nothing of that training is kept. Words after ` -- ` are options of the recipe. The exit status is 1 when the
        loss does not fall at any rate.

        Args:
            recipe: A recipe file, or the name of an installed recipe (see `shardlaunch recipes`).
            ranks: Number of processes on this machine (0: one per GPU, or one without GPUs); the losses are the same.
            strategy: As of `shardlaunch run`.
            low: First rate.
            high: Last rate.
            steps: Number of steps.
            output_dir: Folder of find-lr.json and find-lr.html (default: outputs/RECIPE-find-lr).
            as_json: Print one JSON document, and what the run prints on stderr.
        """
        path = find_recipe(recipe)
        from shardlaunch.launcher.commands.find_lr.curve import Request
        from shardlaunch.launcher.commands.find_lr.main import find_lr as find

        request = Request(low=low, high=high, steps=steps)
        return find(
            path,
            recipe_argv,
            ranks=ranks,
            strategy=strategy,
            request=request,
            output_dir=output_dir,
            as_json=as_json,
        )

    return {"sweep": sweep, "find-lr": find_lr}

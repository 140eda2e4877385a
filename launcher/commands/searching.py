"""The commands that search options of a recipe. Each imports what it needs when it is called."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

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

    return {"sweep": sweep}

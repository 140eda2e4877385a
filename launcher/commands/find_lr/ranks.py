"""The file that the ranks of `shardlaunch find-lr` run, in the place of the recipe's: the rate rises step by step."""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from shardlaunch.checkpoints.files import replace_file
from shardlaunch.checkpoints.records import to_json
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.doctor.recipe import load_recipe
from shardlaunch.launcher.commands.find_lr.curve import Curve, Request
from shardlaunch.launcher.launch import run_and_exit
from shardlaunch.launcher.runs.folder import claim
from shardlaunch.launcher.runs.result import Result

if TYPE_CHECKING:
    from shardlaunch.launcher.runs.run import Run

VARIABLE = "SHARDLAUNCH_FIND_LR"
"""Has the request, as JSON."""
SAY_EVERY_S = 10


def train_rising(run: "Run", request: Request, target: Path) -> Result:
    """Train steps until the loss has diverged, and write their rates and losses. All ranks. Nothing else is saved.

    The option --lr is the highest rate.
    """
    world, warn = run.world, run.display.warn
    with ExitStack() as stack:
        world.peers.together(lambda: stack.enter_context(claim(run.output_dir, warn=warn)) if world.is_main else None)
        run.prepare()
        # In place of the recipe's own, or that of --schedule.
        run.recipe.schedule = lambda step, num_steps: request.rate(step) / request.high  # type: ignore[method-assign]
        curve = _losses(run, request)
        if world.is_main:
            replace_file(target, to_json(curve.record(), indent=1))
    return Result(run_dir=run.output_dir, step=0, is_finished=False)


def _losses(run: "Run", request: Request) -> Curve:
    trainer, curve = run.trainer, Curve()
    batches = trainer.batches.steps(0, request.steps)
    upcoming = trainer.sums.counted(next(batches, None))
    said_at = time.monotonic()
    while upcoming.batch is not None and not curve.has_diverged:
        report, upcoming = trainer.train_step(upcoming, batches, time.perf_counter())
        curve.add(report.lr, report.loss, is_skipped=report.is_skipped)
        if time.monotonic() - said_at > SAY_EVERY_S:
            said_at = time.monotonic()
            run.display.say(f"step {len(curve.losses)}/{request.steps}  loss {report.loss:.4f}  lr {report.lr:.2e}")
    return curve


def main() -> None:
    """Run as a rank, with the options of the recipe on the command line."""
    asked = json.loads(os.environ[VARIABLE])
    path = Path(asked["recipe"])
    request = Request(low=asked["low"], high=asked["high"], steps=asked["steps"])
    sys.path[0] = str(path.absolute().parent)  # as where the recipe's file runs
    recipe_type, findings = load_recipe(path)
    if recipe_type is None:
        raise UserError("; ".join(finding.text for finding in findings))
    run_and_exit(recipe_type, lambda run: train_rising(run, request, Path(asked["target"])))


if __name__ == "__main__":
    main()

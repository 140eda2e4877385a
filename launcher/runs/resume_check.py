"""Check that a recipe resumes exactly: two steps in one go, and two with a resume between them."""

import shutil
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

from shardlaunch.errors import some
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.phases import phase, shown_by
from shardlaunch.launcher.reporting.tracking import read_metrics
from shardlaunch.launcher.runs.run import Run

TOLERANCE = 1e-6  # relative: some kernels of GPUs round differently from run to run
_NEVER = 1_000_000_000
_PLAIN = (bool, int, float, str)


def check_resume(new_run: Callable[[Options, Display], Run], options: Options, display: Display) -> None:
    """Warn if the second step of a recipe differs when it is resumed after the first. All ranks.

    `new_run` returns a run of a new recipe object. The runs have a folder beside the output folder, which is removed.
    """
    quiet = Display(silent=True, on_warning=lambda text: None)
    first = new_run(options, quiet)
    folder = first.output_dir.with_name(f"{first.output_dir.name}.check")
    world = first.world

    def clear() -> None:
        world.peers.together(lambda: shutil.rmtree(folder, ignore_errors=True) if world.is_main else None)

    def run(name: str, steps: int) -> Run:
        wanted = copy(options)
        wanted.output_dir, wanted.stop_at_step = str(folder / name), steps
        wanted.save_every, wanted.eval_every, wanted.log_every, wanted.tracker = 0, _NEVER, 1, "none"
        wanted.resume, wanted.folds, wanted.save_to = "auto", 0, ""
        one = new_run(wanted, quiet)
        one.run()
        return one

    clear()
    with phase("checking that the recipe resumes exactly"), shown_by(quiet.phases):
        straight = run("straight", 2)
        once = run("resumed", 1)
        resumed = run("resumed", 2)
    losses = [_losses(one.output_dir) for one in (straight, resumed)]
    clear()
    expected, found = (of_run.get(2) for of_run in losses)
    if expected is None or found is None:  # a run of one step has no resume
        return
    if abs(expected - found) <= TOLERANCE * max(1.0, abs(expected)):
        display.say("resumed after step 1, step 2 is the same")
        return
    changed = list(_changed(once, straight))
    which = f" From step 1 to step 2 these change: {some(changed)}." if changed else ""
    display.warn(
        f"this recipe does not resume exactly: the loss of step 2 is {expected:.6g}, but {found:.6g} if the run is "
        f"resumed after step 1. The recipe or its model keeps state that no checkpoint has.{which} Derive it from "
        f"self.moment (step, epoch, progress), or keep it in a buffer of the model"
    )


def _losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def _changed(one: Run, other: Run) -> Iterator[str]:
    """Yield the plain attributes of recipe and modules that differ between two runs, with both values."""
    before, after = (dict(_attributes(run)) for run in (one, other))
    for name, value in after.items():
        if before.get(name) != value:
            yield f"{name} ({before.get(name)!r} -> {value!r})"


def _attributes(run: Run) -> Iterator[tuple[str, Any]]:
    owners: list[tuple[str, object]] = [("the recipe's ", run.recipe)]
    owners += [(f"{name}." if name else "the model's ", module) for name, module in run.assembly.model.named_modules()]
    for prefix, owner in owners:
        for name, value in vars(owner).items():
            if isinstance(value, _PLAIN) and not (isinstance(owner, Recipe) and name == "moment"):
                yield prefix + name, value

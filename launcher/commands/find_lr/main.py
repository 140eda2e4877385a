"""`shardlaunch find-lr`: start the ranks, show what the losses say, and write it down."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from shardlaunch.checkpoints.files import error_text, make_folder, replace_file
from shardlaunch.checkpoints.records import read_record, to_json
from shardlaunch.errors import UserError
from shardlaunch.launcher.command_line.parsing import parse_options
from shardlaunch.launcher.commands.ckpt.output import print_json, print_table
from shardlaunch.launcher.commands.doctor.recipe import load_recipe
from shardlaunch.launcher.commands.find_lr import ranks as ranks_file
from shardlaunch.launcher.commands.find_lr.curve import CurveRecord, Request, Suggestion, suggest
from shardlaunch.launcher.commands.find_lr.page import write_page
from shardlaunch.launcher.commands.start import run_recipe
from shardlaunch.launcher.option_fields import flag
from shardlaunch.launcher.recipe import options_type_of, recipe_name
from shardlaunch.launcher.runs.folder import run_folder

RESULT = "find-lr.json"
_CURVE, _RUN = ".curve.json", ".run"
_MOST_ROWS = 15
EXIT_NONE_FOUND = 1
# Of the run in which the rate rises: nothing is saved, resumed, tracked or ended early.
_WORDS = (
    *("--folds", "0", "--resume", "auto", "--stop-at-step", "0", "--extend-to-steps", "0", "--save-every", "0"),
    *("--save-to", "", "--replicate-every", "0", "--tracker", "none", "--early-stopping-patience", "0", "--no-check"),
    *("--on-nonfinite", "skip", "--on-spike", "off", "--digest-every", "0", "--profile", "0"),
)
_UNUSED = ("lr", "schedule", "warmup_steps", "warmup_ratio", "final_lr_ratio", "epochs", "max_steps", "run_name")


def find_lr(
    path: Path,
    recipe_argv: Sequence[str],
    *,
    ranks: int,
    strategy: str,
    request: Request,
    output_dir: Path | None,
    as_json: bool,
) -> int:
    """Train a few steps of a recipe at a rising learning rate and suggest one. Return the exit status.

    0: a rate is suggested; 1: the loss does not fall at any; else that of the run. Raises UserError.
    """
    if not 0 < request.low < request.high < float("inf"):
        raise UserError(f"--low {request.low:g} --high {request.high:g}: must be above 0, the lower one first")
    if request.steps < 10:
        raise UserError(f"--steps {request.steps}: must be at least 10")
    recipe_type, findings = load_recipe(path)
    if recipe_type is None:
        raise UserError("; ".join(finding.text for finding in findings))
    options = parse_options(
        options_type_of(recipe_type), recipe_type.presets, recipe_argv, program=path.name, description=""
    )
    if "output_dir" in options.explicitly_set:
        raise UserError("find-lr: --output-dir stands before ` -- `: what is trained here is not kept")
    own_folder = run_folder(options, recipe_name(recipe_type))
    folder = (output_dir or own_folder.with_name(f"{own_folder.name}-find-lr")).expanduser()
    unused = [name for name in _UNUSED if name in options.explicitly_set]
    if unused and not as_json:
        print(f"{', '.join(map(flag, unused))}: not used here: the rate rises, from --low to --high over --steps")
    try:
        make_folder(folder)
        status = _run(path, recipe_argv, folder, ranks=ranks, strategy=strategy, request=request, is_quiet=as_json)
        if status:
            return status
        curve = read_record(folder / _CURVE, CurveRecord)
        (folder / _CURVE).unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error_text(error)}; choose another --output-dir") from error
    found = suggest(curve.lrs, curve.losses)
    return _show(folder, recipe_name(recipe_type), curve, found, request, as_json=as_json)


def _run(
    path: Path,
    recipe_argv: Sequence[str],
    folder: Path,
    *,
    ranks: int,
    strategy: str,
    request: Request,
    is_quiet: bool,
) -> int:
    run_dir = folder / _RUN
    shutil.rmtree(run_dir, ignore_errors=True)  # that of one that was killed
    asked = {"recipe": str(path), "low": request.low, "high": request.high, "steps": request.steps}
    os.environ[ranks_file.VARIABLE] = json.dumps({**asked, "target": str(folder / _CURVE)})
    own = ["--lr", repr(request.high), "--max-steps", str(request.steps), "--output-dir", str(run_dir)]
    assert ranks_file.__file__ is not None
    stdout = os.dup(1)
    if is_quiet:
        os.dup2(2, 1)
    try:
        return run_recipe(Path(ranks_file.__file__), [*recipe_argv, *_WORDS, *own], ranks=ranks, strategy=strategy)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        shutil.rmtree(run_dir, ignore_errors=True)


def _show(folder: Path, name: str, curve: CurveRecord, found: Suggestion, request: Request, *, as_json: bool) -> int:
    document = {
        "recipe": name,
        "suggested_lr": found.lr,
        "steepest_lr": found.steepest_lr,
        "lowest_loss_lr": found.lowest_lr,
        "has_diverged": curve.has_diverged,
        "lrs": curve.lrs,
        "losses": curve.losses,
        "smooth": list(found.smooth),
    }
    replace_file(folder / RESULT, to_json(document, indent=1))
    page = write_page(folder, name, curve, found)
    if as_json:
        print_json(document)
        return 0 if found.lr is not None else EXIT_NONE_FOUND
    print()
    rows = [["step", "lr", "loss", "running mean"]]
    every = max(1, -(-len(curve.losses) // _MOST_ROWS))
    for step in range(0, len(curve.losses), every):
        mean = f"{found.smooth[step]:.4f}" if step < len(found.smooth) else ""
        rows.append([str(step + 1), f"{curve.lrs[step]:.2e}", f"{curve.losses[step]:.4f}", mean])
    print_table(rows, right=(0, 1, 2, 3))
    print()
    count = len(curve.losses)
    if curve.has_diverged:
        print(f"the loss has diverged at step {count} of {request.steps}, at a rate of {curve.lrs[-1]:.2e}")
    if curve.skipped:
        print(f"{len(curve.skipped)} updates were skipped, as the loss scale of fp16 was too high")
    if found.lr is None:
        print("no suggestion: the loss does not fall; try more --steps, or another --low and --high")
    else:
        falls = f"the loss falls fastest at {found.steepest_lr:.2g}, and is lowest at {found.lowest_lr:.2g}"
        print(f"suggested  --lr {found.lr:.2g}: {falls} (at most a tenth of that)")
        if not curve.has_diverged and found.lowest_lr is not None and found.lowest_lr > request.high / 2:
            print(f"the loss still falls at --high {request.high:g}: a higher one may find a better rate")
    print(f"page       {page}")
    return 0 if found.lr is not None else EXIT_NONE_FOUND

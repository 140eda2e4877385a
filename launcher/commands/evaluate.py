"""`shardlaunch evaluate`: the metrics of a run's checkpoint, on its own data or on other data."""

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardlaunch.checkpoints.files import error_text, make_folder, replace_file
from shardlaunch.checkpoints.records import DamagedRecord, EvaluationRecord, read_record, to_json
from shardlaunch.errors import UserError, printable, some
from shardlaunch.launcher.commands.ckpt.output import print_json, warn
from shardlaunch.launcher.commands.trained import TrainedRun, open_run, reading_data
from shardlaunch.launcher.recipe import recipe_name
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.reporting.tracking import EMA_PREFIX, EVAL_PREFIX, EVALUATIONS
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.runs.ending import confusion_names
from shardlaunch.launcher.runs.folds import checked_splits
from shardlaunch.launcher.runs.identity import data_fingerprint, versions
from shardlaunch.launcher.runs.session import preserved_process, silent_libraries
from shardlaunch.launcher.seeding import derive_seed, seeded
from shardlaunch.launcher.toolkit.other_data import OtherData, chosen_split, evaluated_on
from shardlaunch.launcher.training.evaluation import Evaluator
from shardlaunch.sharding.exact_kernels import deterministic_kernels
from shardlaunch.sharding.precision import apply_precision, convert_model


def evaluate_run(
    path: Path,
    *,
    data: Sequence[str],
    split: str,
    step: int | None,
    ema: bool,
    output: Path | None,
    recipe: str,
    as_json: bool,
) -> int:
    """Print the metrics of a checkpoint, write them to a file, and return the exit status.

    Raises UserError where there is no such run, recipe or data, and for data that do not fit the model.
    """
    display = Display(silent=as_json)
    with preserved_process(), silent_libraries(), collected() as notes:
        run = open_run(path, step=step, recipe_path=recipe, warn=warn)
        source = shlex.join(data) if len(data) > 1 else "".join(data)
        used = _other_data(run, source, split) if source else _own_data(run, split)
        for warning in notes.warnings:
            warn(warning)
        results = _evaluated(run, used, ema=ema, display=display)
        record = _record(run, used, results, source=source, split=split, ema=ema)
    target = output.expanduser() if output is not None else _target(run, record, source)
    _write(target, record)
    if as_json:
        print_json({**record, "output": str(target)})
        return 0
    _show(display, record)
    display.say(f"written to {target}")
    return 0


def _own_data(run: TrainedRun, split: str) -> RunData:
    """Return the run's data with one of its splits as `eval`."""
    data = run.load_data()
    chosen = split or "eval"
    if chosen not in data.splits:
        advice = "" if split else "; evaluate on --split train, or on other data with --data"
        raise UserError(f"--split {chosen}: the run's data have {', '.join(data.splits)}{advice}")
    return replace(data, splits={"train": data.splits["train"], "eval": data.splits[chosen]})


def _other_data(run: TrainedRun, source: str, split: str) -> RunData:
    """Return the run's data with other data as `eval`. Raises UserError where classes or vocabulary would differ."""
    other = OtherData(source=source, split=split)
    with evaluated_on(other):
        data = run.load_data(own=())
        if changed := run.changed_fingerprint("train", data.splits["train"]):
            raise UserError(
                f"--data {source}: the training data are not those of the run any more ({changed}), from which its "
                f"classes and vocabulary come; bring them back"
            )
        if not other.is_used:
            return replace(data, splits={**data.splits, "eval": _data_of_recipe(run, data, other)})
        if run.fold is not None:  # of whose data the held-out part is of the training data
            with seeded(derive_seed(run.recipe.options.seed, "data")):
                data = replace(data, splits={**data.splits, "eval": checked_splits(run.recipe, None)["eval"]})
    return data


def _data_of_recipe(run: TrainedRun, own: RunData, other: OtherData) -> Any:
    """Return the rows of other data that the recipe loads by itself, from its --data. Raises UserError."""
    recipe = copy(run.recipe)
    recipe.options = copy(recipe.options)
    recipe.options.data = other.source
    with reading_data(), seeded(derive_seed(recipe.options.seed, "data")):
        splits = checked_splits(recipe, None)
    if list(recipe.class_names) != list(run.recipe.class_names):
        raise UserError(
            f"--data {other.source}: its classes are {some(recipe.class_names)}, but those of the run are "
            f"{some(run.recipe.class_names)}"
        )
    rows = splits[chosen_split(tuple(splits), other)]
    seed = recipe.options.seed
    if any(data_fingerprint(rows, seed=seed) == data_fingerprint(one, seed=seed) for one in own.splits.values()):
        raise UserError(
            f"--data {other.source}: holds what the run's own data hold, or the recipe does not read --data; remove it"
        )
    return rows


def _evaluated(run: TrainedRun, data: RunData, *, ema: bool, display: Display) -> dict[str, Any]:
    display.say(f"evaluating {run.where} on {len(data.splits['eval']):,} samples ...")
    return metrics_of(run, data, run.model(ema=ema))


def metrics_of(run: TrainedRun, data: RunData, model: nn.Module, *, precision_name: str = "") -> dict[str, Any]:
    """Return the metrics of a model on the run's evaluation data, in the run's precision unless another is named."""
    recipe, world = run.recipe, run.world
    precision = apply_precision(precision_name or run.precision_name, world.device)
    convert_model(model, precision.name)
    batches = data.evaluation_batches(recipe, world)
    assert batches is not None
    data.clock(recipe).set(run.checkpoint.step, is_evaluation=True)
    evaluator = Evaluator(recipe, batches, world=world, precision=precision)
    if recipe.options.exact:  # as in the run: the number of threads changes the bits
        torch.set_num_threads(recipe.options.threads_per_rank or 1)
    with deterministic_kernels() if recipe.options.exact else nullcontext():
        results = evaluator.evaluate(model, lambda done, of: None, lambda: None)
    model.eval()  # the evaluator leaves it ready for training
    return results


def _record(
    run: TrainedRun, data: RunData, results: Mapping[str, Any], *, source: str, split: str, ema: bool
) -> dict[str, Any]:
    rows = data.splits["eval"]
    return {
        "recipe": recipe_name(type(run.recipe)),
        "checkpoint": str(run.where),
        "step": run.checkpoint.step,
        "weights": "average" if ema else "trained",
        "data": source,
        "split": split or ("" if source else "eval"),
        "num_samples": len(rows),
        "fingerprint": data_fingerprint(rows, seed=run.recipe.options.seed),
        "class_names": list(map(str, run.recipe.class_names)),
        "confusions": confusion_names(run.recipe.metrics()),
        "metrics": dict(results),
        "versions": versions(),
    }


def _target(run: TrainedRun, record: Mapping[str, Any], source: str) -> Path:
    """Return the file of an evaluation: one for each step, data and kind of weights. Raises UserError."""
    if run.run_dir is None:
        raise UserError(f"{run.where}: is in no run's folder; say where to write with --output FILE")
    what = record["split"]
    if source:
        words = re.sub(r"[^\w.-]+", "_", Path(source).name).strip("._")[:40]
        what = "-".join(filter(None, (words or "data", record["split"], record["fingerprint"][:8])))
    average = "-average" if record["weights"] == "average" else ""
    return run.run_dir / EVALUATIONS / f"step-{record['step']:08d}-{what}{average}.json"


def _write(target: Path, record: Mapping[str, Any]) -> None:
    """Write an evaluation, in place of an earlier one. Raises UserError for a file that is something else."""
    if target.exists():
        try:
            read_record(target, EvaluationRecord)
        except DamagedRecord:
            raise UserError(f"{target}: exists and is no evaluation; choose another --output") from None
    try:
        make_folder(target.parent)
        replace_file(target, to_json(record, indent=1) + b"\n")
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error_text(error)}; choose another --output") from error


def _show(display: Display, record: Mapping[str, Any]) -> None:
    """Print one table of the metrics, and those that are several numbers below it."""
    metrics = record["metrics"]
    prefix = EMA_PREFIX if record["weights"] == "average" else EVAL_PREFIX
    where = f"{record['data']} " * bool(record["data"]) + record["split"]
    title = f"{record['recipe']}, step {record['step']:,}: {record['num_samples']:,} samples of {where.strip()}"
    single = [(f"{prefix}{name}", value) for name, value in metrics.items() if not isinstance(value, list)]
    display.say("")
    display.columns((printable(title, is_name=True), "value"), [(name, f"{value:.6g}") for name, value in single])
    for name, value in metrics.items():
        if isinstance(value, list):
            display.matrix(name, value, classes=record["class_names"], is_confusion=name in record["confusions"])

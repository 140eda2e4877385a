"""`shardlaunch export`: write a run's model in a format, load it in a fresh process, and compare its outputs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shardlaunch.checkpoints.exporting import CONFIG, weights_of, write_model_folder
from shardlaunch.checkpoints.files import error_text, make_folder
from shardlaunch.checkpoints.names import ADAPTER_CONFIG, BASE, STAGING_PREFIX
from shardlaunch.checkpoints.records import to_json
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.adapters import holds_adapter, merged_weights, merging_note
from shardlaunch.launcher.commands.ckpt.exporting import MERGED, OF_AVERAGE
from shardlaunch.launcher.commands.ckpt.output import size, warn
from shardlaunch.launcher.commands.export.formats import FORMATS, Example, write_format
from shardlaunch.launcher.commands.export.plain import Call, PlainModel, call_of
from shardlaunch.launcher.commands.export.quantized import (
    changes,
    check_quantization,
    comparable_metrics,
    quantization_errors,
    quantize_called_layers,
    write_quantized_folder,
)
from shardlaunch.launcher.commands.export.reload import grouped
from shardlaunch.launcher.commands.trained import TrainedRun, open_run
from shardlaunch.launcher.runs.data import RunData
from shardlaunch.launcher.runs.identity import versions
from shardlaunch.launcher.runs.session import preserved_process, silent_libraries
from shardlaunch.launcher.training.batches import Slot

HF, SAFETENSORS = "hf", "safetensors"
ABOUT = "export.json"
MOST_DIFFERENCE = 1e-4
"""Of an output, in units of the largest one where that is above 1."""
_MOST_BATCHES = 4
_QUANTIZED = (HF, "torch-export")
"""Formats that hold tensors of torchao."""
_FEWER = 3  # samples of the last batch, for a size that is in no other


def export_run(
    path: Path, out: Path, *, kind: str, step: int | None, ema: bool, recipe: str, quantize: str = ""
) -> int:
    """Write a run's model to the folder `out`, whole and compared or not at all; print the largest difference.

    `quantize` is "" or how weights are stored; what that changes is printed too. Raises UserError for a model that
    cannot be written in the format, and for one that computes something else there.
    """
    known = (HF, SAFETENSORS, *FORMATS)
    if kind not in known:
        raise UserError(f"--format {kind or '(none)'}: must be one of {', '.join(known)}")
    if kind in FORMATS:
        FORMATS[kind].check_available(kind)
    if quantize:
        check_quantization(quantize, kind, _QUANTIZED)
    out = Path(os.path.realpath(out.expanduser()))
    if os.path.lexists(out) and not (out.is_dir() and not os.listdir(out)):
        raise UserError(f"{out}: exists and is no empty folder; choose another one")
    with preserved_process(), silent_libraries(), TemporaryDirectory(prefix="shardlaunch-") as scratch:
        run = open_run(path, step=step, recipe_path=recipe, warn=warn, on_cpu=True)
        _check_kind(run, kind)
        data = run.load_data()
        note = merging_note(run.checkpoint) if holds_adapter(run.checkpoint) else ""
        if note:
            warn(note)
            run.recipe.options.lora_base_bits = 0  # nothing can be merged into integers
        model = run.model(ema=ema)
        calls = _calls(run, data, model)
        if run.recipe.options.lora_rank:
            _merge_adapters(model)
        plain = PlainModel(model, list(calls[0].tensors), calls[0].constants)
        expected, costs = _expected(plain, calls), []
        with _staged(out) as staging:
            if kind not in FORMATS:
                weights_dir = Path(scratch, HF) if quantize else staging
                _write_weights(run, weights_dir, ema=ema, note=note)
            if quantize:
                metrics = comparable_metrics(run, data, model)
                with quantization_errors():
                    if kind == HF:
                        plain = plain.of(write_quantized_folder(weights_dir, staging))
                    else:
                        quantize_called_layers(model, partial(_expected, plain, calls[:1]))
                    exact, expected = expected, _expected(plain, calls)
                    costs = changes(
                        quantize, plain, exact, expected, metrics, comparable_metrics(run, data, plain.model)
                    )
            example = Example(inputs=calls[0].tensors, dynamic=_dynamic_axes(calls), output_names=plain.output_names)
            if kind in FORMATS:
                write_format(kind, plain, example, staging)
            difference = _compare(
                kind, staging, calls, expected, Path(scratch), run={"path": str(run.where), "recipe": recipe}
            )
            if kind in FORMATS:
                about = _about(run, kind, example, calls[0], ema=ema, quantize=quantize, difference=difference)
                (staging / ABOUT).write_bytes(to_json(about, indent=1) + b"\n")
            num_bytes = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    samples = sum(len(next(iter(call.tensors.values()))) for call in calls)
    print(f"{out}: {kind}, {size(num_bytes)}")
    print(
        f"  largest difference {difference:.2g} in a fresh process, on {samples} samples of the run's evaluation data"
    )
    for line in costs:
        print(f"  {line}")
    return 0


def _check_kind(run: TrainedRun, kind: str) -> None:
    if kind == HF and CONFIG not in run.checkpoint.manifest.files:
        raise UserError(
            f"--format hf: {run.where} has no {CONFIG}, because the recipe's model is none of transformers; use "
            f"--format safetensors for its weights, or another format for the whole model"
        )
    if kind == SAFETENSORS and holds_adapter(run.checkpoint):
        raise UserError(
            "--format safetensors: the run trains adapters; use --format hf, which merges them into the base model, or "
            "`shardlaunch ckpt export` for the adapters alone"
        )


def _calls(run: TrainedRun, data: RunData, model: nn.Module) -> list[Call]:
    """Return what the recipe gives the model for some batches of evaluation data, the last one of another size."""
    split = "eval" if "eval" in data.splits else "train"
    batches = data.evaluation_batches(run.recipe, run.world) or data.training_batches(run.recipe, run.world)
    num_rows, size = len(data.splits[split]), max(2, run.recipe.options.micro_batch_size)
    firsts = range(0, min(num_rows - size + 1, _MOST_BATCHES * size), size)
    chosen = [np.arange(first, first + size) for first in firsts] or [np.resize(np.arange(num_rows), size)]
    chosen.append(np.resize(np.arange(num_rows), _FEWER if size != _FEWER else _FEWER + 2))
    data.clock(run.recipe).set(run.checkpoint.step, is_evaluation=True)
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(call_of(module, args, kwargs))

    for number, rows in enumerate(chosen):
        inputs = batches.load(Slot(step=0, epoch=0, micro_batch=0, weight=1, samples=rows)).inputs
        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            run.recipe.forward(model, inputs)
        hook.remove()
        if len(calls) != number + 1:
            raise UserError(
                f"export: the recipe's forward() calls the model {len(calls) - number} times per batch; only a model "
                f"that is called once can be exported"
            )
    return calls


def _merge_adapters(model: nn.Module) -> None:
    """Merge adapters of peft into the layers that they are beside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


def _dynamic_axes(calls: Sequence[Call]) -> dict[str, list[int]]:
    """Return the axes of each input that have other sizes from batch to batch."""
    return {
        name: [axis for axis in range(first.dim()) if len({call.tensors[name].shape[axis] for call in calls}) > 1]
        for name, first in calls[0].tensors.items()
    }


@torch.no_grad()
def _expected(plain: PlainModel, calls: Sequence[Call]) -> list[tuple[torch.Tensor, ...]]:
    """Return the outputs for each batch. Raises UserError if there are none."""
    found = [plain(*call.tensors.values()) for call in calls]
    if not found[0]:
        raise UserError("export: the model returns no tensors")
    return found


def _write_weights(run: TrainedRun, staging: Path, *, ema: bool, note: str) -> None:
    """Write a model folder, as `shardlaunch ckpt export` does, with adapters merged."""
    has_adapter = holds_adapter(run.checkpoint)
    weights = merged_weights(run.checkpoint, ema=ema) if has_adapter else weights_of(run.checkpoint, is_average=ema)
    write_model_folder(
        staging,
        weights,
        beside=run.checkpoint,
        leave_out=[ADAPTER_CONFIG, BASE] if has_adapter else [],
        about=" ".join([MERGED] * has_adapter + [note] * bool(note) + [OF_AVERAGE] * ema),
    )


def _compare(
    kind: str,
    folder: Path,
    calls: Sequence[Call],
    expected: Sequence[tuple[torch.Tensor, ...]],
    scratch: Path,
    *,
    run: Mapping[str, str],
) -> float:
    """Return the largest difference between what the model gives here and in a fresh process. Raises UserError."""
    inputs, outputs = scratch / "inputs.safetensors", scratch / "outputs.safetensors"
    given = {f"{number}/{name}": one for number, call in enumerate(calls) for name, one in call.tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, inputs)
    about = {"constants": calls[0].constants, "names": list(calls[0].tensors), "run": json.dumps(run)}
    if problem := in_fresh_process([kind, str(folder), str(inputs), str(outputs), json.dumps(about)]):
        raise UserError(
            f"--format {kind}: the exported model cannot be used: {problem[:400]}. It may hold for the shapes of one "
            f"batch only"
        )
    found = grouped(load_file(outputs))
    differences = [
        _difference(kind, there[str(position)], here)
        for there, outputs_here in zip(found, expected, strict=True)
        for position, here in enumerate(outputs_here)
    ]
    return max(differences)


def in_fresh_process(words: Sequence[str]) -> str:
    """Run `export.reload` in a process of its own; return the last line of its error, empty if there is none."""
    command = [sys.executable, "-m", "shardlaunch.launcher.commands.export.reload", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in ended.stderr.splitlines() if line.strip()] or [f"it ended with {ended.returncode}"]
    return lines[-1] if ended.returncode else ""


def _difference(kind: str, there: torch.Tensor, here: torch.Tensor) -> float:
    if there.shape != here.shape:
        raise UserError(f"--format {kind}: the exported model gives {list(there.shape)}, not {list(here.shape)}")
    if not here.numel():
        return 0.0
    difference = (there.double() - here.double()).abs()
    difference = difference.masked_fill((here == there) | (here.isnan() & there.isnan()), 0)  # also of infinities
    most = float(difference.max())
    scale = max(1.0, float(here.double().abs().nan_to_num(posinf=1.0).max()))
    if not most <= MOST_DIFFERENCE * scale:
        raise UserError(
            f"--format {kind}: the exported model computes something else: its outputs differ by {most:.3g}, where "
            f"the largest is {scale:.3g}. Nothing is written"
        )
    return most


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, which becomes it at the end."""
    staging = out.with_name(f"{STAGING_PREFIX}{out.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        make_folder(staging)
        yield staging
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error_text(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _about(
    run: TrainedRun, kind: str, example: Example, call: Call, *, ema: bool, quantize: str, difference: float
) -> dict[str, Any]:
    return {
        "format": kind,
        "quantize": quantize,
        "recipe": run.checkpoint.recipe.recipe,
        "step": run.checkpoint.step,
        "weights": "average" if ema else "trained",
        "inputs": [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [None if axis in example.dynamic[name] else n for axis, n in enumerate(tensor.shape)],
            }
            for name, tensor in call.tensors.items()
        ],
        "outputs": list(example.output_names),
        "class_names": list(map(str, run.recipe.class_names)),
        "largest_difference": difference,
        "versions": versions(),
    }

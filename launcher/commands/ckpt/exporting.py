"""`ckpt export` and `ckpt average`: write a model folder from one checkpoint, or from the mean of several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from shardlaunch.checkpoints.adapters import PREFIX, is_adapted, merged
from shardlaunch.checkpoints.averaging import mean_of
from shardlaunch.checkpoints.exporting import (
    CONFIG,
    DTYPES,
    Exported,
    bytes_of,
    check_files,
    weights_of,
    write_model_folder,
)
from shardlaunch.checkpoints.finding import checkpoint_at
from shardlaunch.checkpoints.manifest import read_manifest
from shardlaunch.checkpoints.names import ADAPTER_CONFIG, BASE
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.verifying import look_at
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.commands.adapters import holds_adapter, merged_weights, merging_note
from shardlaunch.launcher.commands.ckpt.output import print_json, size, warn
from shardlaunch.launcher.runs.lora import base_of

MERGED = "The LoRA adapter is merged into the base model."
OF_AVERAGE = "The weights are the average that the run has kept; metrics above that begin with eval_ema/ are its own."


def export(
    path: Path,
    out: Path,
    *,
    step: int | None,
    dtype: str | None,
    shard_size: str,
    merge: bool,
    ema: bool,
    as_json: bool,
) -> int:
    """Write a checkpoint's weights, or with `ema` their average, as a model folder. Raises DamagedCheckpoint."""
    shard_bytes = bytes_of(shard_size) if shard_size else 0
    checkpoint = _opened(checkpoint_at(path, step=step, warn=warn), is_average=ema)
    leave_out: list[str] = []
    note = merging_note(checkpoint) if merge and holds_adapter(checkpoint) else ""
    if note:
        warn(note)
    if merge:
        weights = (
            merged_weights(checkpoint, ema=ema) if holds_adapter(checkpoint) else merged(checkpoint, is_average=ema)
        )
        leave_out = [ADAPTER_CONFIG, BASE]  # from_pretrained would look for the adapter
    else:
        weights = weights_of(checkpoint, is_average=ema)
        if holds_adapter(checkpoint):
            warn(f"only the adapter is written, not its base model {base_of(checkpoint).model}; --merge writes both")
            if shard_bytes:
                raise UserError("--shard-size: peft reads an adapter from one file; remove it, or merge with --merge")
        elif is_adapted(weights):
            warn(f"the weights are those of a model of peft, under names that begin with {PREFIX}; --merge merges them")
    exported = write_model_folder(
        out.expanduser(),
        weights,
        beside=checkpoint,
        dtype=DTYPES[dtype] if dtype else None,
        shard_bytes=shard_bytes,
        leave_out=leave_out,
        about=" ".join([MERGED] * merge + [note] * bool(note) + [OF_AVERAGE] * ema),
    )
    _say(out, exported, [checkpoint.step_dir], as_json=as_json, is_model=CONFIG in checkpoint.manifest.files)
    return 0


def average(
    paths: Sequence[Path], *, weights: Sequence[float], dtype: str | None, shard_size: str, as_json: bool
) -> int:
    """Write the mean of several checkpoints' weights as a model folder. Raises DamagedCheckpoint."""
    if len(paths) < 3:
        raise UserError("at least two checkpoints are required, such as RUN/checkpoints/step-*, and then OUT")
    *sources, out = paths
    shard_bytes = bytes_of(shard_size) if shard_size else 0
    checkpoints = [_opened(checkpoint_at(path, warn=warn)) for path in sources]
    if any(map(holds_adapter, checkpoints)):
        if len({base_of(checkpoint).xxh3_64 for checkpoint in checkpoints}) > 1:
            raise UserError("these adapters are for different base models; their mean is one of nothing")
        warn("the factors A and B of adapters are averaged, whose product is not the mean of their products")
    mean = mean_of(checkpoints, weights)
    if mean.of_last:
        warn(f"not averaged, but of {checkpoints[-1].step_dir}: {some(mean.of_last, 3)}, which are no floating-point")
    steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in checkpoints)
    shares = f", weighted {' '.join(f'{share:g}' for share in weights)}" if weights else ""
    exported = write_model_folder(
        out.expanduser(),
        mean.weights,
        beside=checkpoints[-1],
        sources=[checkpoint.step_dir for checkpoint in checkpoints],
        dtype=DTYPES[dtype] if dtype else None,
        shard_bytes=shard_bytes,
        about=f"The weights are the mean of those of steps {steps}{shares}. The metrics above are of one of them.",
    )
    step_dirs = [checkpoint.step_dir for checkpoint in checkpoints]
    is_model = CONFIG in checkpoints[-1].manifest.files
    _say(out, exported, step_dirs, as_json=as_json, is_model=is_model, of_last=mean.of_last)
    return 0


def _opened(step_dir: Path, *, is_average: bool = False) -> Checkpoint:
    """Return the reader of a checkpoint whose weights are verified. Raises DamagedCheckpoint."""
    look_at(step_dir)
    checkpoint = Checkpoint(step_dir=step_dir, manifest=read_manifest(step_dir))
    check_files(checkpoint, is_average=is_average)
    return checkpoint


def _say(
    out: Path,
    exported: Exported,
    step_dirs: Sequence[Path],
    *,
    as_json: bool,
    is_model: bool,
    of_last: Sequence[str] = (),
) -> None:
    document: dict[str, Any] = {"checkpoints": [str(path) for path in step_dirs], "out": str(out)}
    if as_json:
        print_json({**document, **msgspec.to_builtins(exported), "of_last": list(of_last)})
        return
    print(f"{out}: {exported.num_tensors} tensors, {exported.num_elements:,} elements, {size(exported.num_bytes)}")
    print(f"  {', '.join(exported.files)}")
    if exported.became_zero:
        print(f"  {exported.became_zero:,} values that are not 0 became 0")
    if exported.not_finite:
        print(f"  {exported.not_finite:,} values are not finite, as in the checkpoint")
    if not is_model:
        print(f"  no {CONFIG}: the weights load with safetensors, but not with from_pretrained")

"""Write weights as a model folder: safetensors files of a size and dtype, beside a checkpoint's own other files."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shardlaunch.checkpoints.comparing import pieces
from shardlaunch.checkpoints.digests import DigestingFile, digest_file, write_file
from shardlaunch.checkpoints.listing import DamagedCheckpoint
from shardlaunch.checkpoints.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EMA,
    MODEL,
    RECIPE,
    STAGING_PREFIX,
    TRAINER_STATE,
    are_of_adapter,
    index_file_name,
)
from shardlaunch.checkpoints.places import CHUNK_BYTES
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import open_regular, read_bytes
from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT, TensorWriter
from shardlaunch.errors import UserError, some

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES_IN_CONFIG = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
CONFIG = "config.json"
CARD = "README.md"
_WITH_PEFT = re.compile(
    r"from peft import PeftModel\nfrom transformers import AutoConfig, (\w+)\n.*?PeftModel\.from_pretrained\([^\n]*",
    re.DOTALL,
)
_ABOUT_RESUMING = re.compile(r"\n*The files `optimizer-\*\.safetensors` and `trainer_state\.json` serve only[^\n]*\n")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor to write: its name, shape and dtype, and how a flat range of it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(kw_only=True)
class Exported:
    """What was written."""

    files: list[str] = field(default_factory=list)
    num_tensors: int = 0
    num_elements: int = 0
    num_bytes: int = 0
    became_zero: int = 0
    """Values that the dtype is too coarse for."""
    not_finite: int = 0
    """Values that were NaN or infinite already."""


def weights_of(checkpoint: Checkpoint, *, is_average: bool = False) -> list[Weight]:
    """Return the tensors of a checkpoint's model section, or with their averages for those that have one.

    Raises UserError if there is no average.
    """
    averages = {spec.name: spec for spec in checkpoint.specs() if spec.section == EMA} if is_average else {}
    if is_average and not averages:
        raise UserError(
            f"--ema: {checkpoint.step_dir} holds no average of the weights: its run keeps none (--ema, "
            f"--ema-half-life, --swa-from), or had not begun it at step {checkpoint.step:,}"
        )

    def reader(spec_: object) -> Callable[[int, int], torch.Tensor]:
        return lambda start, end: checkpoint.read(spec_, start, end)  # type: ignore[arg-type]

    return [
        Weight(name=spec.name, shape=spec.shape, dtype=spec.dtype, read=reader(averages.get(spec.name, spec)))
        for spec in checkpoint.specs()
        if spec.section == MODEL
    ]


def bytes_of(text: str) -> int:
    """Return the bytes that a size such as `5GB` or `500 MB` means. Raises UserError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)i?B?\s*", text)
    num_bytes = int(float(match[1]) * 1000 ** " kMGT".index(match[2].replace("K", "k") or " ")) if match else 0
    if num_bytes < 1:
        raise UserError(f"--shard-size {text}: is no size; write it as in 5GB or 500MB")
    return num_bytes


def write_model_folder(
    out: Path,
    weights: Sequence[Weight],
    *,
    beside: Checkpoint,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 0,
    sources: Iterable[Path] = (),
    leave_out: Iterable[str] = (),
    about: str = "",
) -> Exported:
    """Write weights to the folder `out`, with the files of `beside` that are no state of a run. Appears by one rename.

    `dtype` is that of floating-point tensors (None: their own), `shard_bytes` the most of a file (0: one file). Needs
    memory for pieces of tensors. `about` is added to the model card; `out` may not be in one of `sources`. Raises
    UserError, and leaves nothing, where `out` holds something, a value becomes infinite, or a file cannot be written.
    """
    out = Path(os.path.realpath(out))
    for source in (beside.step_dir, *sources):
        _check_out(out, source)
    staging = out.with_name(f"{STAGING_PREFIX}{out.name}")
    exported = Exported()
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _check_room(staging, weights, dtype)
        _write_weights(staging, weights, dtype, shard_bytes, exported)
        _copy_others(staging, beside, dtype, set(leave_out), about, exported)
        with suppress(FileNotFoundError):
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return exported


def check_files(checkpoint: Checkpoint, *, is_average: bool = False) -> None:
    """Compare the digests of the files that an export, of weights or average, reads. Raises DamagedCheckpoint."""
    sections = (MODEL, EMA) if is_average else (MODEL,)
    names = {file for spec, file in checkpoint.manifest.tensors.items() if spec.section in sections}
    for name in sorted(names | set(_others(checkpoint))):
        record = checkpoint.manifest.files[name]
        if digest_file(checkpoint.step_dir / name, kind=record.kind) != record:
            raise DamagedCheckpoint(
                f"{checkpoint.step_dir / name}: the file is damaged (its digest differs from the manifest's)"
            )


def _check_out(out: Path, step_dir: Path) -> None:
    if step_dir.resolve() in (out, *out.parents):
        raise UserError(f"{out}: is in the checkpoint itself; choose another folder")
    try:
        if os.path.lexists(out) and (not out.is_dir() or os.listdir(out)):
            raise UserError(f"{out}: exists and is no empty folder; choose another one")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from error


def _written_dtype(weight: Weight, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and weight.dtype.is_floating_point else weight.dtype


def _bytes_written(weight: Weight, dtype: torch.dtype | None) -> int:
    return weight.num_elements * BYTES_PER_ELEMENT[_written_dtype(weight, dtype)]


def _check_room(folder: Path, weights: Sequence[Weight], dtype: torch.dtype | None) -> None:
    needed, free = sum(_bytes_written(weight, dtype) for weight in weights), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"{free / 1e6:,.1f} MB are free, but {needed / 1e6:,.1f} MB are needed", str(folder)
        )


def _shards(weights: Sequence[Weight], dtype: torch.dtype | None, shard_bytes: int) -> list[list[Weight]]:
    """Fill files in the order of the tensors. One that is larger than a file has one of its own."""
    shards: list[list[Weight]] = [[]]
    num_bytes = 0
    for weight in weights:
        size = _bytes_written(weight, dtype)
        if shard_bytes and shards[-1] and num_bytes + size > shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(weight)
        num_bytes += size
    return shards


def _write_weights(
    folder: Path, weights: Sequence[Weight], dtype: torch.dtype | None, shard_bytes: int, exported: Exported
) -> None:
    shards = _shards(weights, dtype, shard_bytes)
    overflows: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{MODEL}{of}.safetensors"
        if are_of_adapter(weight.name for weight in weights):
            name = ADAPTER_WEIGHTS
        entries = [(weight.name, _written_dtype(weight, dtype), weight.shape) for weight in shard]
        writer = TensorWriter(folder / name, entries)
        try:
            for weight in shard:
                weight_map[weight.name] = name
                count = _write_weight(writer, weight, _written_dtype(weight, dtype), exported)
                if count:
                    overflows[weight.name] = count
            writer.finish()
        finally:
            writer.close()
        exported.files.append(name)
    if overflows:
        raise UserError(
            f"--dtype: {sum(overflows.values()):,} values would become infinite, in {some(overflows, 3)}; "
            f"bf16 has the range of fp32"
        )
    exported.num_tensors = len(weights)
    exported.num_elements = sum(weight.num_elements for weight in weights)
    exported.num_bytes = sum(_bytes_written(weight, dtype) for weight in weights)
    if len(shards) > 1:
        name = index_file_name(MODEL)
        index = {"metadata": {"total_size": exported.num_bytes}, "weight_map": weight_map}
        write_file(folder / name, json.dumps(index, indent=1).encode())
        exported.files.append(name)


def _write_weight(writer: TensorWriter, weight: Weight, dtype: torch.dtype, exported: Exported) -> int:
    """Write a tensor and return how many of its values have become infinite."""
    num_overflows = 0
    for start, end in pieces(weight.num_elements):
        piece = weight.read(start, end)
        written = piece.to(dtype)
        if dtype.is_floating_point:
            if not all_finite(written):
                was_finite, is_finite = piece.isfinite(), written.isfinite()
                num_overflows += int((was_finite & ~is_finite).sum())
                exported.not_finite += int((~was_finite).sum())
            if dtype != weight.dtype:
                exported.became_zero += int(piece.count_nonzero() - written.count_nonzero())
        writer.write(written.contiguous().view(torch.uint8).numpy().data)
    return num_overflows


def all_finite(piece: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite, in one pass."""
    return piece.numel() == 0 or all(math.isfinite(bound.item()) for bound in piece.aminmax())


def _others(checkpoint: Checkpoint) -> list[str]:
    """Return the files of a checkpoint that belong to the model, but for its weights."""
    state = {TRAINER_STATE, RECIPE, *checkpoint.manifest.tensors.values()}
    return [
        name
        for name in checkpoint.manifest.files
        if name not in state and not name.endswith((".safetensors", ".safetensors.index.json"))
    ]


def _copy_others(
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    leave_out: set[str],
    about: str,
    exported: Exported,
) -> None:
    for name in _others(checkpoint):
        source = checkpoint.step_dir / name
        if name in leave_out:
            continue
        if name == CONFIG and dtype is not None:
            write_file(folder / name, _with_dtype(read_bytes(source), _NAMES_IN_CONFIG[dtype]))
        elif name == CARD:
            text = read_bytes(source).decode(errors="replace")
            if ADAPTER_CONFIG in leave_out:
                text = _WITH_PEFT.sub(r'from transformers import \1\n\nmodel = \1.from_pretrained(".")', text)
            write_file(folder / name, _card(text, about).encode())
        else:
            _copy(source, folder / name)
        exported.files.append(name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    file = DigestingFile(target)
    try:
        with open_regular(source) as opened:
            while data := opened.read(CHUNK_BYTES):
                file.write(memoryview(data))
        file.finish()
    finally:
        file.close()


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """Return a configuration of transformers that names the dtype of the weights, also in its parts."""

    def changed(value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {
            key: dtype if key in ("dtype", "torch_dtype") and isinstance(one, str) else changed(one)
            for key, one in value.items()
        }

    try:
        return json.dumps(changed(json.loads(config)), indent=2).encode() + b"\n"
    except ValueError:  # of a recipe that writes something else under this name
        return config


def _card(text: str, about: str) -> str:
    """Return a model card without what it says on the files of a run's state, and with `about`."""
    text = _ABOUT_RESUMING.sub("\n", text).replace('glob("model-*.safetensors")', 'glob("model*.safetensors")')
    return f"{text.rstrip()}\n\n## Export\n\n{about}\n" if about else text

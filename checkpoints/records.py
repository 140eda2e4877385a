"""Records of runs and checkpoints: the schemas of their JSON files, and the one place that reads them.

What a file holds comes from outside, even where this package wrote it: a disk, another tool or a person may have
changed it. So nothing but a regular file of a sensible size is opened, and no value is used that has not passed a
schema.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shardlaunch.errors import UserError

T = TypeVar("T")

MOST_BYTES = 64 << 20  # of a JSON file: a manifest of 330,000 tensors
_LARGEST = 2**63 - 1
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

Count = Annotated[int, Meta(ge=0, le=_LARGEST)]
Crc = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
Mark = Literal["identity", "warn", "free"]


class DamagedRecord(UserError):
    """Raised for a file that is missing, no regular file, too large, or not what its schema says."""


class Record(Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of the schemas."""


class LeftOut(Record):
    """Steps whose global batches a run does not train on, the last of which had a bad loss."""

    first: Annotated[int, Meta(ge=1, le=_LARGEST)]
    last: Annotated[int, Meta(ge=1, le=_LARGEST)]
    cause: str


class Position(Record):
    """The position of a run: everything that a checkpoint keeps besides tensors, in trainer_state.json."""

    step: Count = 0  # global batches consumed
    best_value: float | None = None
    best_step: Count = 0
    best_metric: str = ""
    evaluations_since_best: Count = 0
    is_finished: bool = False
    is_evaluation_due: bool = False  # of this step; the run was stopped before the end of it
    has_stopped_early: bool = False  # by --early-stopping-patience: an extension does not go on from there
    left_out: list[LeftOut] = []  # by --on-nonfinite and --on-spike rollback
    recent_losses: list[float] = []  # that --on-spike judges by
    callbacks: dict[str, dict[str, Any]] = {}  # their states, by name
    loss_scale: dict[str, int | float] = {}
    exact_exponents: dict[str, int] = {}  # of the units of --exact, by parameter
    group_hyperparameters: list[dict[str, Any]] = []  # of the optimizer
    non_persistent_buffers: str = ""  # digest of their values
    num_averaged: Count = 0  # updates that the average of the weights has taken in

    def __post_init__(self) -> None:
        if self.best_step > self.step:
            raise ValueError(f"best_step {self.best_step} is after step {self.step}")
        if self.loss_scale:
            value, good_steps = self.loss_scale.get("value"), self.loss_scale.get("good_steps")
            is_whole = isinstance(good_steps, int) and good_steps >= 0 and len(self.loss_scale) == 2
            if not is_whole or value is None or not 0 < value < math.inf:
                raise ValueError(f"loss_scale {self.loss_scale} is none")


class FileEntry(Record):
    """A file in a manifest, with one of two digests."""

    bytes: Count
    crc64nvme: Crc | UnsetType = UNSET
    xxh3_128: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")] | UnsetType = UNSET  # up to version 3


class TensorListing(Record, kw_only=True):
    """A tensor in a manifest. `kind` is what version 1 has instead of section and entry; the CRC is there since 4."""

    name: str
    section: Literal["model", "optimizer", "ema"] | UnsetType = UNSET
    entry: str | UnsetType = UNSET
    kind: str | UnsetType = UNSET
    shape: list[Count]
    dtype: str
    file: str
    crc64nvme: Crc | UnsetType = UNSET


class ManifestHead(Struct):
    """What all versions of a manifest have, in a folder that may be of another tool."""

    format: str
    version: int


class ManifestRecord(Record, kw_only=True):
    """manifest.json. `num_tensors` counts those of each section, since version 3."""

    format: str
    version: int
    step: Count
    files: dict[str, FileEntry]
    tensors: list[TensorListing]
    num_tensors: dict[str, Count] | UnsetType = UNSET
    aliases: dict[str, str]
    xxh3_128: str


class HeaderEntry(Record):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class IndexRecord(Struct, kw_only=True):
    """*.safetensors.index.json, also of other tools, which may have more in it."""

    weight_map: dict[str, str]


class IdentityRecord(Record):
    """The identity of a run: values by option or fact."""

    identity: dict[str, Any]
    warn: dict[str, Any]


class BaseRecord(Record):
    """base.json of a checkpoint that holds an adapter: the model that it belongs to."""

    model: str
    """Folder or hub id; empty: not known."""
    xxh3_64: str
    """Of the values that the run does not train."""
    num_parameters: int


class RecipeRecord(Record):
    """recipe.json of a checkpoint."""

    recipe: str
    options: dict[str, Any]
    run: IdentityRecord


class OptionRecord(Record):
    """An option in run.json."""

    value: Any
    mark: Mark


class RecipeFile(Record):
    """Where the class of a run's recipe is declared."""

    path: str
    class_name: str
    xxh3_128: str
    """Of the file's content when the run began or was last resumed."""


class BookmarkRecord(Record):
    """The state of an iterable at a row, and digests of the rows from there on, by which it is known to be right."""

    row: Count
    num_passes: Count
    first_of_pass: Count
    rows: list[str]
    state: dict[str, Any]


class RunRecord(IdentityRecord, kw_only=True):
    """run.json of an output folder."""

    options: dict[str, OptionRecord]
    ranks: Annotated[int, Meta(ge=1, le=_LARGEST)]
    strategy: str
    versions: dict[str, str]
    machine: dict[str, str]
    tracking_id: Annotated[str, Meta(pattern="^[0-9A-Za-z_-]{1,64}$")] | UnsetType = UNSET  # release 0.1.0 has none
    extended_to_steps: Count | UnsetType = UNSET
    left_out: list[LeftOut] = []
    recipe_file: RecipeFile | UnsetType = UNSET  # a notebook has none, nor have runs of earlier versions


class EvaluationRecord(Record):
    """A file in evaluations/ of a run's folder, which `shardlaunch evaluate` writes."""

    recipe: str
    checkpoint: str
    step: Count
    weights: Literal["trained", "average"]
    data: str
    """What --data said; empty: the run's own data."""
    split: str
    num_samples: Count
    fingerprint: str
    class_names: list[str]
    confusions: list[str]
    """Names of the metrics that are confusion matrices."""
    metrics: dict[str, Any]
    versions: dict[str, str]


_NAMES: Mapping[Any, str] = {
    Position: "position of a run",
    ManifestHead: "manifest",
    ManifestRecord: "manifest",
    IndexRecord: "index of weights",
    RecipeRecord: "record of a recipe",
    RunRecord: "record of a run",
    EvaluationRecord: "record of an evaluation",
}


def regular_size(path: Path, *, follows_links: bool = False) -> int:
    """Return the bytes of a regular file. Raises DamagedRecord for a missing file and for anything else."""
    try:
        found = path.stat() if follows_links else path.lstat()
    except OSError as error:
        raise DamagedRecord(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise DamagedRecord(f"{path}: is {kind}, where a regular file must be")
    return found.st_size


def open_regular(path: Path, *, follows_links: bool = False) -> FileIO:
    """Open a regular file for reading, without buffer. Raises DamagedRecord for a missing file and for anything else.

    Nothing else is opened: a pipe would wait for a writer, and a device may never end.
    """
    regular_size(path, follows_links=follows_links)
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follows_links else os.O_NOFOLLOW)
    try:
        return FileIO(os.open(path, flags))
    except OSError as error:
        raise DamagedRecord(f"{path}: {error.strerror}") from error


def read_bytes(path: Path, *, most_bytes: int = MOST_BYTES, follows_links: bool = False) -> bytes:
    """Return the content of a regular file. Raises DamagedRecord if it is unreadable or larger than `most_bytes`."""
    with open_regular(path, follows_links=follows_links) as file:
        try:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > most_bytes:
                raise DamagedRecord(f"{path}: {num_bytes:,} bytes, but at most {most_bytes:,} are read")
            with open(file.fileno(), "rb", closefd=False) as whole:
                return whole.read(num_bytes)
        except OSError as error:
            raise DamagedRecord(f"{path}: {error.strerror}") from error


def decode(path: Path | str, data: bytes, schema: type[T]) -> T:
    """Return the record that JSON data holds. Raises DamagedRecord, which says what of it the schema does not allow."""
    try:
        try:
            return msgspec.json.decode(data, type=schema)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            if b"NaN" not in data and b"Infinity" not in data:
                raise
            # Release 0.1.0 wrote these bare, which is not JSON.
            return msgspec.convert(json.loads(data, parse_constant=str), schema)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, schema, _reason(error)) from error


def read_record(path: Path, schema: type[T]) -> T:
    """Return the record in a JSON file of a run or checkpoint. Raises DamagedRecord."""
    return decode(path, read_bytes(path), schema)


def read_position(path: Path, *, is_first_version: bool) -> Position:
    """Return the position in trainer_state.json. Raises DamagedRecord.

    Checkpoints of the first version lack some of it, and have two old names.
    """
    data = read_bytes(path)
    saved = decode(path, data, dict[str, Any])
    if is_first_version:
        renamed = {_RENAMED.get(name, name): value for name, value in saved.items()}
        saved = {**msgspec.structs.asdict(Position()), **renamed}
    missing = [name for name in Position.__struct_fields__ if name not in saved and name not in _ADDED]
    if missing:
        raise _unreadable(path, Position, f"it has no {', '.join(missing)}")
    return decode(path, msgspec.json.encode(saved), Position)


# Since the third version of the manifest.
_ADDED = ("is_evaluation_due", "left_out", "recent_losses", "callbacks", "num_averaged")
_RENAMED = {"group_numbers": "group_hyperparameters", "constants": "non_persistent_buffers"}


def read_metrics_line(path: Path, data: bytes) -> dict[str, Any]:
    """Return a line of metrics.jsonl, with its NaN and infinities as numbers. Raises DamagedRecord."""
    line: dict[str, Any] = as_meant(decode(path, data, dict[str, Any]))
    wrong = [
        name
        for name, value in line.items()
        if not (_is_digest(value) if name in DIGESTS else _is_metric(value, is_scalar=name in _SCALARS))
    ]
    step = line.get("step")
    if wrong or not isinstance(step, int) or step < 0:
        raise _unreadable(path, dict, f"no metric at {', '.join(wrong) or 'step'}")
    return line


DIGESTS = ("weights_digest", "optimizer_digest", "ema_digest")
"""Entries of a line of metrics.jsonl that are 16 hexadecimal digits."""
_SCALARS = ("step", "epoch", "loss", "lr", "grad_norm", "samples", "tokens", "step_s", "eval/loss", "eval_ema/loss")


def _is_metric(value: Any, *, is_scalar: bool = False) -> bool:
    if isinstance(value, list) and not is_scalar:
        return all(map(_is_metric, value))
    return isinstance(value, int | float) and not (is_scalar and isinstance(value, bool))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """Return a value as JSON, with the numbers that JSON does not have as text: "NaN", "Infinity", "-Infinity"."""
    return json.dumps(as_written(value), indent=indent, allow_nan=False).encode()


def as_written(value: Any) -> Any:
    """Return a value as `to_json` writes it: text for numbers that JSON does not have, lists for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value  # the question whether it is a Mapping takes a tenth of a second for each new type
    if isinstance(value, list | tuple):
        return [as_written(one) for one in value]
    if isinstance(value, Mapping):
        return {key: as_written(one) for key, one in value.items()}
    return value


def as_meant(value: Any) -> Any:
    """Return a value that `to_json` has written, with its NaN and infinities as numbers again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, Mapping):
        return {key: as_meant(one) for key, one in value.items()}
    if isinstance(value, list):
        return [as_meant(one) for one in value]
    return value


def _unreadable(path: Path | str, schema: Any, reason: str) -> DamagedRecord:
    return DamagedRecord(f"{path}: not a readable {_NAMES.get(schema, 'record')} ({reason})")


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())

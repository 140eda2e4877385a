"""The identity of a run, and its comparison on resume."""

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from shardlaunch.checkpoints.records import IdentityRecord, LeftOut, RecipeFile, as_written
from shardlaunch.errors import UserError
from shardlaunch.launcher.optimization.lora import LoraOptions
from shardlaunch.launcher.options import Options, flag, marks
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.seeding import seeded
from shardlaunch.launcher.training.fetching import row_of

_PACKAGES = ("shardlaunch", "torch", "accelerate", "transformers", "datasets", "numpy", "safetensors")
# Number of rows to digest, evenly spaced, of a data set without a fingerprint() method.
SAMPLED_ROWS = 4096
FEW_ROWS = 8  # of one whose stored form has a fingerprint, but whose rows are made of it
FULL_DIGEST_BYTES = 1 << 30
_INIT_DIGEST = "digest of the weights of --init-from"
_ABSENT = {
    **{"--ema": 0.0, "--ema-half-life": 0.0, "--swa-from": 0.0, "--eval-ema": "both"},
    **{"--attention": "plain", "--eval-micro-batch-size": 0},
    **{"--gradient-checkpointing-every": 1, "--chunked-loss": False, "--lora-base-bits": 0},
}
"""What runs did that began before there were these options. At these values they are no part of an identity."""
_ORDER = "order of the batches"
_FORMER_ORDER = "digest of the batch plan"  # stands in the records of runs in the order of FormerPlan


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Fields compared on resume: `identity` fields must be equal, differing `warn` fields only cause a warning.

    `former_digest` returns the digest of the former order, which takes its memory and time.
    """

    identity: Mapping[str, Any]
    warn: Mapping[str, Any]
    former_digest: Callable[[], str]

    @property
    def has_former_order(self) -> bool:
        """Whether the run's batches have the order of FormerPlan."""
        return _FORMER_ORDER in self.identity

    def in_order_of(self, saved: IdentityRecord) -> "Identity":
        """Return this identity, or that with the former order if the saved run has it, which a resume keeps."""
        if self.has_former_order or _FORMER_ORDER not in saved.identity:
            return self
        fields = {name: value for name, value in self.identity.items() if name != _ORDER}
        return replace(self, identity={**fields, _FORMER_ORDER: self.former_digest()})

    def check(self, saved: IdentityRecord, where: str, *, hint: str) -> list[str]:
        """Compare with a checkpoint's record and return descriptions of the differences that only affect rounding.

        Raises UserError if identity fields differ, with both values of each, options first. The message ends with
        `hint`, an option that starts a new run.
        """
        expected, here = dict(saved.identity), self.in_order_of(saved).identity
        if _INIT_DIGEST not in here:  # a resumed run does not need --init-from
            expected.pop(_INIT_DIGEST, None)
        refused = _differences(expected, here)
        if refused:
            raise UserError(
                f"cannot resume {where}: it holds another run ({', '.join(refused)}). "
                f"To resume it, use its values. To start a new run: {hint}"
            )
        return _differences(saved.warn, self.warn)

    def digest(self) -> int:
        """Return a digest of the identity, a positive 64-bit integer."""
        return xxhash.xxh3_64_intdigest(json.dumps(self.identity).encode()) >> 1

    def to_json(self) -> dict[str, Any]:
        """Return the record stored in checkpoints and run.json."""
        return {"identity": dict(self.identity), "warn": dict(self.warn)}


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {_value(saved, name)!r} -> {_value(here, name)!r}"
        for name in {**saved, **here}
        if _value(saved, name) != _value(here, name)
    ]


def _value(fields: Mapping[str, Any], name: str) -> Any:
    return fields.get(name, _ABSENT.get(name))


def run_identity(
    recipe_name: str,
    options: Options,
    *,
    num_steps: int,
    data: Mapping[str, str],
    order: str,
    former_digest: Callable[[], str],
    fold: int | None,
    init_digest: str | None,
    references: Mapping[str, str],
    in_effect: Mapping[str, Any],
) -> Identity:
    """Return the identity of a run. `in_effect` gives resolved values of `warn` options (precision, threads, ...).

    `order` says what the order of the batches follows from.
    """
    by_mark: dict[str, dict[str, Any]] = {"identity": {}, "warn": {}, "free": {}}
    for name, mark in marks(options).items():
        # With early stopping, the interval and metrics of the evaluations decide where the run ends.
        decides = name in ("eval_every", "eval_ema", "metrics") and options.early_stopping_patience
        by_mark["identity" if decides else mark][flag(name)] = as_json(getattr(options, name))
    if not options.lora_rank:  # as in the records of runs from before there was LoRA
        for f in fields(LoraOptions):
            del by_mark["identity"][flag(f.name)]
    # The number of steps is compared instead of the two options that set it.
    for name in ("--epochs", "--max-steps"):
        del by_mark["identity"][name]
    for name, default in _ABSENT.items():
        if by_mark["identity"].get(name) == default:
            del by_mark["identity"][name]
    identity = {
        "recipe": recipe_name,
        **by_mark["identity"],
        "number of steps (--epochs, --max-steps)": num_steps,
        **({"fold": fold + 1} if fold is not None else {}),
        **({_INIT_DIGEST: init_digest} if init_digest is not None else {}),
        **{reference_key(name): digest for name, digest in references.items()},
        **{f"fingerprint of the {name} data": digest for name, digest in data.items()},
        _ORDER: order,
    }
    return Identity(identity=identity, warn={**by_mark["warn"], **in_effect}, former_digest=former_digest)


def run_record(
    identity: Identity, recipe: Recipe, ranks: int, strategy: str, *, extended_to: int, left_out: Sequence[LeftOut]
) -> dict[str, Any]:
    """Return the content of run.json. `extended_to`: the last step of a run that is extended, else 0."""
    options, file = recipe.options, recipe_file(type(recipe))
    extended = {"extended_to_steps": extended_to} if extended_to else {}
    return {
        **identity.to_json(),
        "options": {
            name: {"value": value, "mark": marks(options)[name]} for name, value in option_values(options).items()
        },
        "ranks": ranks,
        "strategy": strategy,
        "versions": versions(),
        "machine": {"python": platform.python_version(), "processor": platform.machine()},
        **extended,
        **({"left_out": msgspec.to_builtins(left_out)} if left_out else {}),
        **({"recipe_file": msgspec.to_builtins(file)} if file is not None else {}),
    }


def recipe_file(recipe_type: type[Recipe]) -> RecipeFile | None:
    """Return where a recipe is declared, None where that is no file that can be read, as in a notebook."""
    path = Path(getattr(sys.modules[recipe_type.__module__], "__file__", None) or "")
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return RecipeFile(
        path=str(path.absolute()), class_name=recipe_type.__name__, xxh3_128=xxhash.xxh3_128_hexdigest(content)
    )


def option_values(options: Options) -> dict[str, Any]:
    """Return the options as JSON values."""
    values: dict[str, Any] = as_json(asdict(options))
    return values


def as_json(value: Any) -> Any:
    """Return a value as JSON stores it: tuples as lists, paths and other objects, NaN and infinities as strings."""
    return as_written(json.loads(json.dumps(value, default=str)))


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a run's numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def reference_key(name: str) -> str:
    """Return under which name the digest of a reference model is part of what a run is."""
    return f"digest of the reference model {name!r}"


def data_fingerprint(dataset: Any, *, seed: int = 0) -> str:
    """Return a digest of a data set's content, whatever its path.

    Calls the data set's `fingerprint()` if it has one, and digests a few rows too if they are not as they are stored.
    Digests all rows of Hugging Face data sets, those above 1 GiB in the order in which they are stored, which is
    faster; of others the number of rows and 4,096 evenly spaced rows, as the first epoch of a run with this seed has
    them.
    """
    num_rows = SAMPLED_ROWS
    digest = xxhash.xxh3_128(str(len(dataset)).encode())
    if hasattr(dataset, "fingerprint"):
        stored = str(dataset.fingerprint())
        if getattr(dataset, "is_stored", True):
            return stored
        digest.update(stored.encode())
        num_rows = FEW_ROWS
    if hasattr(dataset, "with_format") and hasattr(dataset, "data"):
        if dataset.data.nbytes > FULL_DIGEST_BYTES and dataset._indices is not None:
            digest_value(digest, dataset._indices.column(0).to_numpy())
            dataset = type(dataset)(dataset.data, info=dataset.info, fingerprint=dataset._fingerprint)
        _digest_arrow(digest, dataset)
    else:
        with seeded(seed):
            for row in _spread(len(dataset), num_rows):
                digest_value(digest, row_of(dataset, int(row), seed))
    return digest.hexdigest()


def _spread(num_rows: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, num_rows - 1, min(num_rows, most)).astype(np.int64))


def _digest_arrow(digest: xxhash.xxh3_128, dataset: Any) -> None:
    import pyarrow as pa

    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata(None).combine_chunks())
        digest.update(sink.getvalue())


def digest_value(digest: xxhash.xxh3_128, value: Any) -> None:
    """Add a row's content to a digest; of objects that are not data, only their type."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().numpy()
    elif not isinstance(value, np.ndarray) and hasattr(value, "__array_interface__"):  # an image
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            digest_value(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            digest_value(digest, item)
    elif isinstance(value, bytes | str | int | float | bool | None):
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    else:  # an object's repr may contain its address
        digest.update(type(value).__qualname__.encode())

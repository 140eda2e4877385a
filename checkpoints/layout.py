"""Where each tensor of a checkpoint is: folder names, file names, and which rank writes what."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardlaunch.checkpoints.state import TensorSpec, specs_by_section

CHECKPOINTS = "checkpoints"  # folder of a run, with one folder per saved step
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
RECIPE = "recipe.json"

_STEP_DIR = re.compile(r"step-([0-9]{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@ -]*")


def step_dir_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of_dir_name(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, None for other names."""
    match = _STEP_DIR.fullmatch(name)
    return int(match[1]) if match and step_dir_name(int(match[1])) == name else None


def index_file_name(section: str) -> str:
    """Return the name of the index file of a section, which maps each tensor to its file."""
    return f"{section}.safetensors.index.json"


def is_plain_file_name(name: str) -> bool:
    """Return whether a name read from a file is safe to append to a folder: no separators, not hidden."""
    return _FILE_NAME.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """One safetensors file of a checkpoint: its name, the rank that writes it, and its tensors."""

    file_name: str
    owner: int
    specs: tuple[TensorSpec, ...]


def plan_files(specs: Sequence[TensorSpec], num_ranks: int) -> list[TensorFile]:
    """Assign tensors to ranks, balanced by bytes, with one file per rank and section. The same result on every rank.

    Sections have separate files: `model-*`, `optimizer-*`. A rank without tensors of a section writes no file for it.
    """
    return [
        file for section, its_specs in specs_by_section(specs).items() for file in _files(section, its_specs, num_ranks)
    ]


def _files(prefix: str, specs: Sequence[TensorSpec], num_ranks: int) -> list[TensorFile]:
    by_owner = [(owner, owned) for owner, owned in enumerate(_by_owner(specs, num_ranks)) if owned]
    return [
        TensorFile(
            file_name=f"{prefix}-{number:05d}-of-{len(by_owner):05d}.safetensors", owner=owner, specs=tuple(owned)
        )
        for number, (owner, owned) in enumerate(by_owner, start=1)
    ]


def _by_owner(specs: Sequence[TensorSpec], num_ranks: int) -> list[list[TensorSpec]]:
    """Assign each tensor, largest first, to the rank with the fewest bytes (ties: the lower rank)."""
    num_bytes = [0] * num_ranks
    owner: dict[str, int] = {}
    for spec in sorted(specs, key=lambda spec: (-spec.num_bytes, spec.key)):
        rank = num_bytes.index(min(num_bytes))
        num_bytes[rank] += spec.num_bytes
        owner[spec.key] = rank
    by_owner: list[list[TensorSpec]] = [[] for _ in range(num_ranks)]
    for spec in specs:
        by_owner[owner[spec.key]].append(spec)
    return by_owner

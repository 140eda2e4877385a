"""Where each tensor of a checkpoint lies: folder names, file names, and which rank writes what."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardlaunch.checkpoints.state import TensorSpec, specs_by_section

CHECKPOINTS = "checkpoints"  # the folder of a run that holds one folder per saved step
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
RECIPE = "recipe.json"

_STEP_DIR = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@ -]*")


def step_dir_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of_dir_name(name: str) -> int | None:
    """Return the step that a folder name stands for, None when it is not such a name."""
    match = _STEP_DIR.fullmatch(name)
    return int(match[1]) if match else None


def index_file_name(section: str) -> str:
    """Return the name of the file that says in which file of a section each tensor is."""
    return f"{section}.safetensors.index.json"


def is_plain_file_name(name: str) -> bool:
    """Return whether a name read from a file is safe to join to a folder: no separators, not hidden."""
    return _FILE_NAME.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """Name one safetensors file of a checkpoint, the rank that writes it, and its tensors."""

    file_name: str
    owner: int
    specs: tuple[TensorSpec, ...]


def plan_files(specs: Sequence[TensorSpec], num_ranks: int) -> list[TensorFile]:
    """Spread tensors over ranks by bytes and ranks over files; the same answer on every rank.

    Each section goes to files of its own: `model-*`, `optimizer-*`. No tensors, no file.
    """
    return [
        file for section, its_specs in specs_by_section(specs).items() for file in _files(section, its_specs, num_ranks)
    ]


def _files(prefix: str, specs: Sequence[TensorSpec], num_ranks: int) -> list[TensorFile]:
    shares = [(owner, share) for owner, share in enumerate(_shares(specs, num_ranks)) if share]
    return [
        TensorFile(file_name=f"{prefix}-{number:05d}-of-{len(shares):05d}.safetensors", owner=owner, specs=tuple(share))
        for number, (owner, share) in enumerate(shares, start=1)
    ]


def _shares(specs: Sequence[TensorSpec], num_ranks: int) -> list[list[TensorSpec]]:
    """Give each tensor, largest first, to the rank with the fewest bytes (ties: the lower rank)."""
    load = [0] * num_ranks
    owner: dict[str, int] = {}
    for spec in sorted(specs, key=lambda spec: (-spec.num_bytes, spec.key)):
        rank = load.index(min(load))
        load[rank] += spec.num_bytes
        owner[spec.key] = rank
    shares: list[list[TensorSpec]] = [[] for _ in range(num_ranks)]
    for spec in specs:
        shares[owner[spec.key]].append(spec)
    return shares

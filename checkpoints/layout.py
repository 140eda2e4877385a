"""Where each tensor of a checkpoint is: folder names, file names, and which rank writes what."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardlaunch.checkpoints.names import CHECKPOINTS as CHECKPOINTS
from shardlaunch.checkpoints.names import MANIFEST as MANIFEST
from shardlaunch.checkpoints.names import RECIPE as RECIPE
from shardlaunch.checkpoints.names import TRAINER_STATE as TRAINER_STATE
from shardlaunch.checkpoints.names import index_file_name as index_file_name
from shardlaunch.checkpoints.names import is_plain_file_name as is_plain_file_name
from shardlaunch.checkpoints.names import step_dir_name as step_dir_name
from shardlaunch.checkpoints.names import step_of_dir_name as step_of_dir_name
from shardlaunch.checkpoints.state import TensorSpec, specs_by_section


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

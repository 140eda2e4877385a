"""Where each tensor of a checkpoint is: folder names, file names, and offsets in files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardlaunch.checkpoints.digests import FileRecord, crc64nvme, joined
from shardlaunch.checkpoints.names import ADAPTER_WEIGHTS, MODEL, are_of_adapter
from shardlaunch.checkpoints.names import CHECKPOINTS as CHECKPOINTS
from shardlaunch.checkpoints.names import MANIFEST as MANIFEST
from shardlaunch.checkpoints.names import RECIPE as RECIPE
from shardlaunch.checkpoints.names import TRAINER_STATE as TRAINER_STATE
from shardlaunch.checkpoints.names import index_file_name as index_file_name
from shardlaunch.checkpoints.names import is_listed_file_name as is_listed_file_name
from shardlaunch.checkpoints.names import is_plain_file_name as is_plain_file_name
from shardlaunch.checkpoints.names import step_dir_name as step_dir_name
from shardlaunch.checkpoints.names import step_of_dir_name as step_of_dir_name
from shardlaunch.checkpoints.state import TensorSpec, specs_by_section
from shardlaunch.checkpoints.tensorfile import header_of

FILE_BYTES = 5_000_000_000  # a new file is begun beyond that; what the hubs and their tools do well with


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """One safetensors file of a checkpoint: its name, and its tensors one after the other."""

    file_name: str
    specs: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> bytes:
        """Return the bytes before the first tensor."""
        return header_of((spec.key, spec.dtype, spec.shape) for spec in self.specs)

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(spec.num_bytes for spec in self.specs)

    def record(self, crcs: Mapping[TensorSpec, int]) -> FileRecord:
        """Return size and digest of the file, which follow from its header and the CRCs of its tensors."""
        parts = [(crc64nvme(self.header), len(self.header)), *((crcs[spec], spec.num_bytes) for spec in self.specs)]
        return FileRecord(num_bytes=self.num_bytes, digest=f"{joined(parts):016x}")

    def offsets(self) -> Iterator[tuple[TensorSpec, int]]:
        """Yield each tensor with its offset in bytes from the start of the file."""
        offset = len(self.header)
        for spec in self.specs:
            yield spec, offset
            offset += spec.num_bytes


def plan_files(specs: Sequence[TensorSpec], *, file_bytes: int = FILE_BYTES) -> list[TensorFile]:
    """Divide tensors into files of at most `file_bytes`, in the order given; a larger tensor has a file of its own.

    The same for any number of ranks. Sections have separate files: `model-*`, `optimizer-*`. The weights of an adapter
    alone are in one file, as peft reads it.
    """
    sections = specs_by_section(specs)
    files = []
    if are_of_adapter(spec.name for spec in sections.get(MODEL, ())):
        files = [TensorFile(file_name=ADAPTER_WEIGHTS, specs=tuple(sections.pop(MODEL)))]
    return files + [file for section, its_specs in sections.items() for file in _files(section, its_specs, file_bytes)]


def _files(prefix: str, specs: Sequence[TensorSpec], file_bytes: int) -> list[TensorFile]:
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not groups or spec.num_bytes > room:
            groups.append([])
            room = file_bytes
        groups[-1].append(spec)
        room -= spec.num_bytes
    return [
        TensorFile(file_name=f"{prefix}-{number:05d}-of-{len(groups):05d}.safetensors", specs=tuple(group))
        for number, group in enumerate(groups, start=1)
    ]

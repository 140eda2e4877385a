"""The ways to keep a training state that benchmarks/checkpoint_io.py compares, and the state itself."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.shares import share_of
from shardlaunch.checkpoints.state import MODEL, ONLY, OPTIMIZER, Fragment, TensorSpec
from shardlaunch.checkpoints.writer import save
from shardlaunch.sharding.world import World

NUM_BLOCKS = 12
VOCABULARY = 30522
CHUNK_BYTES = 16 << 20
RAW, OURS = "raw", "ours"

Work = Callable[[Path], object]


@dataclass(kw_only=True)
class Arm:
    """Hold a way to keep state: how it saves to a folder and loads from it, and the seconds of each round."""

    name: str
    tensors: Callable[[], Sequence[torch.Tensor]]  # what this rank holds, as a load leaves it
    load: Work
    save: Work | None = None  # None: loads what another launch wrote
    is_durable: bool = False  # its own save ends with all on the disk
    save_s: list[float] = field(default_factory=list)
    returned_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)

    def digests(self) -> list[str]:
        return [xxhash.xxh3_128_hexdigest(bytes_of(tensor)) for tensor in self.tensors()]


def specs(gigabytes: float) -> Iterator[TensorSpec]:
    """Give the tensors of a GPT and its AdamW, of about `gigabytes` in all."""
    area = 12 * NUM_BLOCKS  # parameters = area * width**2 + VOCABULARY * width, each of 12 bytes
    width = (math.sqrt(VOCABULARY**2 + 4 * area * gigabytes * 1e9 / 12) - VOCABULARY) / (2 * area)
    width = max(16, 16 * round(width / 16))
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (VOCABULARY, width)}
    for block in range(NUM_BLOCKS):
        for name, rows, columns in (("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            shapes[f"blocks.{block}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * width,)
        for name in ("norm_1", "norm_2"):
            shapes[f"blocks.{block}.{name}.weight"] = shapes[f"blocks.{block}.{name}.bias"] = (width,)
    for name, shape in shapes.items():
        yield TensorSpec(name=name, section=MODEL, shape=shape, dtype=torch.float32)
        for entry in ("exp_avg", "exp_avg_sq"):
            yield TensorSpec(name=name, section=OPTIMIZER, entry=entry, shape=shape, dtype=torch.float32)
        yield TensorSpec(name=name, section=OPTIMIZER, entry="step", shape=(), dtype=torch.float32)


def fragments(gigabytes: float, *, rank: int, num_ranks: int) -> list[Fragment]:
    """Return the shard (rows) of each tensor that a rank holds; a scalar is whole on each rank."""
    held = []
    for seed, spec in enumerate(specs(gigabytes)):
        tensor = torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed))
        begin, end = 0, spec.num_elements
        if spec.shape:
            chunk = math.ceil(spec.shape[0] / num_ranks)
            first, last = (min(n * chunk, spec.shape[0]) for n in (rank, rank + 1))
            row = spec.num_elements // spec.shape[0]
            tensor, begin, end = tensor[first:last].clone(), first * row, last * row
        replica = ONLY if spec.shape else None
        held.append(Fragment(spec=spec, flat_start=begin, flat_end=end, tensor=tensor, replica=replica))
    return held


def save_ours(folder: Path, held: Iterable[Fragment], peers: Peers) -> None:
    """Save as a run does. All ranks."""
    share = share_of(held, rank=peers.rank, num_ranks=peers.num_ranks)
    save(folder, position=Position(step=1), share=share, export=lambda staging: None, aliases={}, peers=peers)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Make the arms, which share what this rank holds."""

    world: World
    gigabytes: float
    held: list[Fragment]

    def tensors(self) -> list[torch.Tensor]:
        return [fragment.tensor for fragment in self.held]

    def raw(self) -> Arm:
        def write(folder: Path) -> None:
            with open(folder / self._file_name, "xb", buffering=0) as file:
                for tensor in self.tensors():
                    data = bytes_of(tensor)
                    while data:
                        data = data[file.write(data[:CHUNK_BYTES]) :]
                os.fsync(file.fileno())
            fsync(folder)

        def read(folder: Path) -> None:
            with open(folder / self._file_name, "rb", buffering=0) as file:
                for tensor in self.tensors():
                    data = bytes_of(tensor)
                    while data:
                        data = data[file.readinto(data[:CHUNK_BYTES]) or len(data) :]

        return Arm(name=RAW, tensors=self.tensors, save=write, load=read, is_durable=True)

    def ours(self, name: str) -> Arm:
        def load(folder: Path) -> None:
            (step_dir,) = folder.glob("step-*")
            checkpoint = open_checkpoint(step_dir, peers=self.world.peers, checks_tensors=False)
            for fragment in self.held:
                checkpoint.read_into(fragment.spec, fragment.flat_start, fragment.tensor)
            checkpoint.verify_read(self.world.peers)

        def save(folder: Path) -> None:
            save_ours(folder, self.held, self.world.peers)

        return Arm(name=name, tensors=self.tensors, save=save, load=load, is_durable=True)

    def dcp_state(self) -> dict[str, Any]:
        """Return what torch.distributed.checkpoint saves: shards as DTensors. All ranks."""
        state: dict[str, Any] = {fragment.spec.key: fragment.tensor for fragment in self.held}
        alone = self.world.size == 1
        mesh = None if alone else init_device_mesh("cpu", (self.world.size,))
        for fragment in self.held:
            shape = fragment.spec.shape
            if mesh and shape:
                stride = torch.empty(shape, device="meta").stride()
                state[fragment.spec.key] = DTensor.from_local(
                    fragment.tensor, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride
                )
        return state

    def dcp(self) -> Arm:
        state, alone = self.dcp_state(), self.world.size == 1
        return Arm(
            name="torch.distributed.checkpoint",
            tensors=self.tensors,
            save=lambda folder: dcp_save(state, checkpoint_id=folder, no_dist=alone),
            load=lambda folder: dcp_load(state, checkpoint_id=folder, no_dist=alone),
        )

    def accelerate(self) -> Arm:
        model = nn.Module()
        states: dict[str, dict[str, torch.Tensor]] = {}
        for fragment in fragments(self.gigabytes, rank=0, num_ranks=1):
            name = fragment.spec.name.replace(".", "_")
            if fragment.spec.section == MODEL:
                model.register_parameter(name, nn.Parameter(fragment.tensor))
            else:
                states.setdefault(name, {})[fragment.spec.entry] = fragment.tensor
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.state.update({parameter: states[name] for name, parameter in model.named_parameters()})
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(model, optimizer)

        def tensors() -> list[torch.Tensor]:  # a load replaces the optimizer's
            entries = (optimizer.state[parameter] for parameter in model.parameters())
            return [*(p.detach() for p in model.parameters()), *(t for entry in entries for t in entry.values())]

        return Arm(
            name="accelerate",
            tensors=tensors,
            save=lambda folder: accelerator.save_state(str(folder)),
            load=lambda folder: accelerator.load_state(str(folder)),
        )

    def torch_save(self) -> Arm:
        state = {fragment.spec.key: fragment.tensor for fragment in self.held}

        def load(folder: Path) -> None:
            for key, tensor in torch.load(folder / self._file_name, weights_only=True).items():
                state[key].copy_(tensor)

        def save(folder: Path) -> None:
            torch.save(state, folder / self._file_name)

        return Arm(name="torch.save", tensors=self.tensors, save=save, load=load)

    @property
    def _file_name(self) -> str:
        return f"rank-{self.world.rank}"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor."""
    data: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return data


def fsync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

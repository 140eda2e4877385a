"""Host memory while a sharded run starts: a shard and a tensor, not the model."""

import ctypes
import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardlaunch import Options, Recipe
from shardlaunch.data import stored_weights
from shardlaunch.launcher.runs.assembly import assemble
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS
from shardlaunch.sharding.world import World, connect, disconnect
from tests.distributed.ranks import run_on_ranks

WIDTH, LAYERS = 1024, 16
MODEL_BYTES = 4 * WIDTH * WIDTH * LAYERS
PEAK = Path("/proc/self/clear_refs")


def _net(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def _start(source: str, width: int, world: World) -> None:
    class Measured(Recipe):
        options: Options
        layer_classes = ("Linear",)

        def model(self) -> nn.Module:
            return _net(width)

        def weights(self) -> Mapping[str, torch.Tensor]:
            with torch.device("meta"):
                return stored_weights(source, _net(width).state_dict()) if source else {}

    assembly = assemble(
        Measured(Options(threads_per_rank=1)),
        world=world,
        strategy_name="fsdp2",
        settings=DEFAULT_SETTINGS,
        precision_name="fp32",
        run_digest=0,
        step=0,
        is_resumed=False,
    )
    assert bool(assembly.origins.pretrained) == bool(source and world.is_main)


def _peaks(folder: str) -> list[float]:
    """Return by how much of the model's size this process grows while the model starts, drawn and pretrained."""
    torch.set_num_threads(1)
    world = connect(read_environment(), needs_group=True)
    peaks = []
    for source in ("", f"{folder}/model.safetensors"):
        _start("", 8, world)  # libraries are warm
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is needed now
        PEAK.write_text("5")  # sets VmHWM back (proc(5))
        before = _status_bytes("VmRSS")
        _start(source, WIDTH, world)
        peaks.append((_status_bytes("VmHWM") - before) / MODEL_BYTES)
    disconnect(world)
    return peaks


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@pytest.mark.skipif(not PEAK.exists(), reason="peaks of memory are measured on Linux only")
def test_a_start_needs_memory_for_a_shard_and_a_tensor(tmp_path: Path) -> None:
    """Of 64 MiB, half on each of 2 ranks, in tensors of 4 MiB; once the first rank had all of it."""
    save_file(_net(WIDTH).state_dict(), tmp_path / "model.safetensors")
    for peaks in run_on_ranks(2, _peaks, str(tmp_path)):
        assert max(peaks) < 1, peaks  # in pieces this small, a good part is what malloc keeps

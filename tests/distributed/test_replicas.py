"""The newest state in the memory of machines comes back after a crash, also where one of them is lost."""

import os
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlaunch import fit
from shardlaunch.checkpoints import memory
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import checkpoint_steps, open_checkpoint
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NetRecipe, final_tensors, losses

OPTIONS: dict[str, Any] = {
    "max_steps": 8,
    "save_every": 3,
    "replicate_every": 2,
    "ema_half_life": 40,  # the average of the weights comes back too
    "threads_per_rank": 1,
    "tracker": "none",
    "save_on_best": False,
    "keep": 0,
    "strategy": "fsdp2",
}


class Replicated(NetRecipe):
    """May end in its sixth step, after a checkpoint of step 3 and a copy of step 4."""

    ends_in = -1

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        if self.moment.step == self.ends_in:
            raise RuntimeError("as if killed")
        return super().loss(outputs, batch)


def _on_its_own_machine(folder: Path, run_dir: Path, ends_in: int) -> list[str]:
    """Train with each rank as the only one of a machine, and return the warnings."""
    rank = os.environ["RANK"]
    socket.gethostname = lambda: f"machine-{rank}"
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ["SHARDLAUNCH_MEMORY_DIR"] = str(folder / f"machine-{rank}")
    Replicated.ends_in = ends_in
    if ends_in > 0:
        with pytest.raises(RuntimeError, match="as if killed"):
            fit(Replicated, output_dir=run_dir, **OPTIONS)
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Replicated, output_dir=run_dir, **OPTIONS)
    return [str(warning.message) for warning in caught]


def _parts(machine: Path) -> list[tuple[int, int, int]]:
    return [part for folder in machine.glob("*") for part in memory.parts_in(folder)]


def _crash(folder: Path) -> Path:
    run_on_ranks(3, _on_its_own_machine, folder, folder / "run", 5)
    assert checkpoint_steps(folder / "run" / "checkpoints") == [3]
    for rank, before in ((0, 2), (1, 0), (2, 1)):
        assert _parts(folder / f"machine-{rank}") == sorted([(4, 3, rank), (4, 3, before)])
    return folder / "run"


def _assert_as_without(run_dir: Path) -> None:
    whole = run_dir.with_name("whole")
    fit(Replicated, output_dir=whole, **{**OPTIONS, "replicate_every": 0, "strategy": "single"})
    assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-6)
    for name, tensor in final_tensors(whole).items():
        assert torch.allclose(final_tensors(run_dir)[name], tensor, atol=1e-6)


def test_a_lost_machine_comes_back_from_the_memory_of_the_next(tmp_path: Path) -> None:
    run_dir = _crash(tmp_path)
    shutil.rmtree(tmp_path / "machine-2")  # with its own part
    assert run_on_ranks(2, _on_its_own_machine, tmp_path, run_dir, -1) == [[], []]
    assert checkpoint_steps(run_dir / "checkpoints") == [3, 4, 6, 8]
    assert open_checkpoint(run_dir / "checkpoints" / "step-00000004", peers=Peers()).step == 4
    _assert_as_without(run_dir)
    assert not _parts(tmp_path / "machine-0"), "the disk has all of it now"


def test_a_copy_that_is_damaged_or_not_whole_is_not_used(tmp_path: Path) -> None:
    run_dir = _crash(tmp_path)
    for rank in range(3):
        for path in (tmp_path / f"machine-{rank}").rglob("rank-00001-of-*"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    said = run_on_ranks(2, _on_its_own_machine, tmp_path, run_dir, -1)
    assert any("step 4 is not brought back from memory: " in line for line in said[0]), said
    assert checkpoint_steps(run_dir / "checkpoints") == [3, 6, 8]
    _assert_as_without(run_dir)

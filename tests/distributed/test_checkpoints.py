"""Tensors that are sharded over ranks in any way become whole tensors in files, and shards are read back."""

import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from shardlaunch import UserError
from shardlaunch.checkpoints.manifest import DamagedCheckpoint
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.shares import share_of
from shardlaunch.checkpoints.state import MODEL, ONLY, Fragment, Replica, TensorSpec
from shardlaunch.checkpoints.writer import save
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import connect, disconnect
from tests.distributed.ranks import run_on_ranks

SHAPES = [(7, 5), (1,), (), (0, 3), (64, 33), (3, 2, 2), (1000,), (2,)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.bool]


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"t{i}": (torch.rand(shape, generator=generator) * 100).to(DTYPES[i % len(DTYPES)])
        for i, shape in enumerate(SHAPES * 3)
    }


def _fragments(how: str, rank: int, num_ranks: int) -> list[Fragment]:
    """Return a rank's fragments: whole tensors, equal shards, random cuts, two replicas, or all on the last."""
    random = np.random.default_rng(1)
    fragments = []
    replica = ONLY if how != "whole" else None
    if how == "replicas":  # ranks 0 and 1 hold the same, and so on
        replica = Replica(rank % 2, 2)
    for name, tensor in _tensors().items():
        n = tensor.numel()
        cuts = [0, *sorted(random.integers(0, n + 1, num_ranks - 1).tolist()), n]
        size = -(-n // num_ranks)
        start, end = {
            "whole": (0, n),
            "shards": (min(n, rank * size), min(n, (rank + 1) * size)),
            "cuts": (cuts[rank], cuts[rank + 1]),
            "replicas": (n * (rank // 2) // (num_ranks // 2), n * (rank // 2 + 1) // (num_ranks // 2)),
            "last": (0, n) if rank == num_ranks - 1 else (n, n),
        }[how]
        spec = TensorSpec(name=name, section=MODEL, shape=tuple(tensor.shape), dtype=tensor.dtype)
        held = tensor.reshape(-1)[start:end]
        fragments.append(Fragment(spec=spec, flat_start=start, flat_end=end, tensor=held, replica=replica))
    return fragments


def _save(folder: Path, fragments: list[Fragment], peers: Peers) -> Path:
    share = share_of(fragments, rank=peers.rank, num_ranks=peers.num_ranks)
    position = Position(step=1)
    return save(folder, position=position, share=share, export=lambda staging: None, aliases={}, peers=peers)


def _save_and_read(folder: Path, hows: list[str]) -> None:
    world = connect(read_environment())
    for how in hows:
        _save(folder / how, _fragments(how, world.rank, world.size), world.peers)
        checkpoint = open_checkpoint(folder / how / "step-00000001", peers=world.peers)
        tensors = _tensors()
        for fragment in _fragments(hows[0], world.rank, world.size):
            shard = checkpoint.read(fragment.spec, fragment.flat_start, fragment.flat_end, fragment.replica or ONLY)
            assert torch.equal(shard, tensors[fragment.spec.name].reshape(-1)[fragment.flat_start : fragment.flat_end])
        checkpoint.verify_read(world.peers)
        hows = hows[1:] + hows[:1]
    disconnect(world)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_any_sharding_becomes_the_same_files(num_ranks: int, tmp_path: Path) -> None:
    hows = ["whole", "shards", "cuts", "last", *(["replicas"] if num_ranks % 2 == 0 else [])]
    run_on_ranks(num_ranks, _save_and_read, tmp_path, hows)
    manifests = {(tmp_path / how / "step-00000001" / "manifest.json").read_text() for how in hows}
    assert len(manifests) == 1, "the files' digests do not say who held what"


def _read_damaged(folder: Path, how: str, key: str) -> str:
    """Return the error of a rank that reads its shards, after a bit of one has changed beneath it."""
    world = connect(read_environment())
    step_dir = _save(folder, _fragments("whole", world.rank, world.size), world.peers)
    checkpoint = open_checkpoint(step_dir, peers=world.peers)
    if world.is_main:
        path = step_dir / "model-00001-of-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[checkpoint._offsets[next(spec for spec in checkpoint.specs() if spec.key == key)]] ^= 4
        path.write_bytes(data)
    world.peers.together(lambda: None)
    for fragment in _fragments(how, world.rank, world.size):
        checkpoint.read(fragment.spec, fragment.flat_start, fragment.flat_end, fragment.replica or ONLY)
    with pytest.raises(DamagedCheckpoint) as caught:
        checkpoint.verify_read(world.peers)
    checkpoint.verify_read(world.peers)  # nothing is read since
    disconnect(world)
    return str(caught.value)


@pytest.mark.parametrize("how", ["whole", "shards", "replicas", "last"])
def test_damage_that_one_rank_reads_is_known_to_all(how: str, tmp_path: Path) -> None:
    answers = run_on_ranks(4, _read_damaged, tmp_path, how, "t4")
    assert len(set(answers)) == 1
    assert "the digest of t4 differs" in answers[0]


def _save_with_a_gap(_: Path) -> str:
    world = connect(read_environment())
    fragments = _fragments("shards", world.rank, world.size)
    try:
        _save(Path("unused"), fragments if world.rank else fragments[:4] + _fragments("last", 0, 2)[4:], world.peers)
    except AssertionError as error:
        return str(error)
    return "saved"


def test_a_state_with_a_gap_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = run_on_ranks(2, _save_with_a_gap, tmp_path)
    assert all("t4: 1056 elements written, of 2112" in answer for answer in answers), answers


def _save_with_a_full_rank(folder: Path) -> str:
    world = connect(read_environment())
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    try:
        _save(folder, _fragments("shards", world.rank, world.size), world.peers)
    except UserError as error:
        return str(error)
    return "saved"


def test_a_rank_that_cannot_write_makes_all_drop_the_save(tmp_path: Path) -> None:
    answers = run_on_ranks(3, _save_with_a_full_rank, tmp_path)
    assert len(set(answers)) == 1
    assert "not saved" in answers[0]
    assert "File too large" in answers[0]
    assert list(tmp_path.iterdir()) == []

"""Tensors that are sharded over ranks in any way become whole tensors in files, and shards are read back."""

import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from shardlaunch import UserError
from shardlaunch.checkpoints.gather import gather
from shardlaunch.checkpoints.layout import plan_files
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.state import MODEL, Fragment, TensorSpec, fragments_by_key
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
    """Return a rank's fragments: whole tensors, equal shards, random cuts, overlapping ones, or all on the last."""
    random = np.random.default_rng(1)
    fragments = []
    for name, tensor in _tensors().items():
        n = tensor.numel()
        cuts = [0, *sorted(random.integers(0, n + 1, num_ranks - 1).tolist()), n]
        size = -(-n // num_ranks)
        start, end = {
            "whole": (0, n),
            "shards": (min(n, rank * size), min(n, (rank + 1) * size)),
            "cuts": (cuts[rank], cuts[rank + 1]),
            "overlapping": (cuts[rank], n),
            "last": (0, n) if rank == num_ranks - 1 else (n, n),
        }[how]
        spec = TensorSpec(name=name, section=MODEL, shape=tuple(tensor.shape), dtype=tensor.dtype)
        fragments.append(Fragment(spec=spec, flat_start=start, flat_end=end, tensor=tensor.reshape(-1)[start:end]))
    return fragments


def _save(folder: Path, fragments: list[Fragment], peers: Peers) -> Path:
    position = Position(step=1)
    return save(folder, position=position, state=fragments, export=lambda staging: None, aliases={}, peers=peers)


def _save_and_read(folder: Path, hows: list[str]) -> None:
    world = connect(read_environment())
    for how in hows:
        _save(folder / how, _fragments(how, world.rank, world.size), world.peers)
        checkpoint = open_checkpoint(folder / how / "step-00000001", peers=world.peers)
        tensors = _tensors()
        for fragment in _fragments("cuts", world.rank, world.size):
            shard = checkpoint.read(fragment.spec, fragment.flat_start, fragment.flat_end)
            assert torch.equal(shard, tensors[fragment.spec.name].reshape(-1)[fragment.flat_start : fragment.flat_end])
    disconnect(world)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_any_sharding_becomes_the_same_files(num_ranks: int, tmp_path: Path) -> None:
    hows = ["whole", "shards", "cuts", "overlapping", "last"]
    run_on_ranks(num_ranks, _save_and_read, tmp_path, hows)
    manifests = {(tmp_path / how / "step-00000001" / "manifest.json").read_text() for how in hows}
    assert len(manifests) == 1, "the files' digests do not say who held what"


def _gather_in_small_buckets(how: str, bucket_bytes: int) -> None:
    world = connect(read_environment())
    fragments = fragments_by_key(_fragments(how, world.rank, world.size))
    files = plan_files([fragment.spec for fragment in fragments.values()], world.size)
    received: dict[str, bytes] = {file.file_name: b"" for file in files if file.owner == world.rank}
    for file, chunks in gather(files, fragments, world.peers, bucket_bytes=bucket_bytes):
        assert sum(len(chunk) for chunk in chunks) <= bucket_bytes
        received[file.file_name] += b"".join(chunks)
    tensors = _tensors()
    for file in files:
        if file.owner == world.rank:
            flat = [tensors[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes() for spec in file.specs]
            assert received[file.file_name] == b"".join(flat)
    disconnect(world)


@pytest.mark.parametrize("how", ["cuts", "last"])
def test_no_message_is_larger_than_a_bucket(how: str) -> None:
    run_on_ranks(3, _gather_in_small_buckets, how, 1 << 10)


def _gather_with_a_gap(_: Path) -> str:
    world = connect(read_environment())
    fragments = _fragments("shards", world.rank, world.size)
    try:
        _save(Path("unused"), fragments if world.rank else fragments[:4] + _fragments("last", 0, 2)[4:], world.peers)
    except AssertionError as error:
        return str(error)
    return "saved"


def test_a_state_with_a_gap_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = run_on_ranks(2, _gather_with_a_gap, tmp_path)
    assert all("no rank has element 0 of 12" in answer for answer in answers), answers


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

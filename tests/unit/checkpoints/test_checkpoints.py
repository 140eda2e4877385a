"""Checkpoints are read back bit by bit, and damaged ones are never loaded."""

import errno
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shardlaunch import UserError
from shardlaunch.checkpoints.layout import (
    is_listed_file_name,
    is_plain_file_name,
    plan_files,
    step_dir_name,
    step_of_dir_name,
)
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, checkpoint_steps, latest_checkpoint, open_checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.retention import prune, sweep
from shardlaunch.checkpoints.shares import own_pieces, share_of
from shardlaunch.checkpoints.state import MODEL, OPTIMIZER, Fragment, TensorSpec, whole
from shardlaunch.checkpoints.writer import save

ALONE = Peers()


def _state() -> list[Fragment]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator)
    return [
        whole("layer.weight", weight),
        whole("layer.scale", torch.tensor(3.5)),
        whole("layer.half", weight.bfloat16()),
        whole("layer.empty", torch.empty(0, 4)),
        whole("layer.count", torch.tensor([2**62, -1])),
        whole("layer.mask", torch.tensor([True, False])),
        whole("layer.transposed", weight.T),
        whole("layer.weight", weight * 2, section=OPTIMIZER, entry="exp_avg"),
        whole("layer.weight", torch.tensor(12.0), section=OPTIMIZER, entry="step"),
    ]


def _export(staging: Path) -> None:
    (staging / "config.json").write_text("{}")


def _save(folder: Path, step: int, *, is_evaluation_due: bool = False) -> Path:
    return save(
        folder,
        position=Position(step=step, is_evaluation_due=is_evaluation_due),
        share=share_of(_state()),
        export=_export,
        aliases={"head.weight": "layer.weight"},
        peers=ALONE,
    )


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_save(tmp_path, 500), peers=ALONE)
    assert (checkpoint.step, checkpoint.position) == (500, Position(step=500))
    assert checkpoint.manifest.aliases == {"head.weight": "layer.weight"}
    saved = set(checkpoint.specs())
    for fragment in _state():
        spec = fragment.spec
        assert spec in saved
        expected = fragment.tensor.reshape(-1)
        assert torch.equal(checkpoint.read(spec, 0, spec.num_elements), expected)
        middle = spec.num_elements // 2
        assert torch.equal(checkpoint.read(spec, middle, spec.num_elements), expected[middle:])


def test_safetensors_alone_reads_every_tensor_once(tmp_path: Path) -> None:
    step_dir = _save(tmp_path, 1)
    found = {}
    for path in step_dir.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                assert key not in found
                found[key] = file.get_tensor(key)
    assert found.keys() == {fragment.spec.key for fragment in _state()}
    for fragment in _state():
        assert torch.equal(found[fragment.spec.key], fragment.tensor)
    index = json.loads((step_dir / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {f.spec.name for f in _state() if f.spec.section == MODEL}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _forge_file_name(step_dir: Path) -> None:
    path = step_dir / "manifest.json"
    path.write_text(path.read_text().replace("config.json", "../config.json"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the weights": lambda d: _flip(next(d.glob("model-*"))),
    "a flipped bit in the optimizer": lambda d: _flip(next(d.glob("optimizer-*"))),
    "a flipped bit in the manifest": lambda d: _flip(d / "manifest.json"),
    "a flipped bit in the state": lambda d: _flip(d / "trainer_state.json"),
    "a missing shard": lambda d: next(d.glob("model-*")).unlink(),
    "a missing manifest": lambda d: (d / "manifest.json").unlink(),
    "an empty manifest": lambda d: (d / "manifest.json").write_text(""),
    "a manifest that is a list": lambda d: (d / "manifest.json").write_text("[1]"),
    "a shard cut short": lambda d: next(d.glob("model-*")).write_bytes(next(d.glob("model-*")).read_bytes()[:-3]),
    "a file name that leads out": _forge_file_name,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped(name: str, tmp_path: Path) -> None:
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    DAMAGE[name](newer)
    with pytest.raises(UserError, match="step-00000002"):
        open_checkpoint(newer, peers=ALONE)
    errors: list[UserError] = []
    found = latest_checkpoint([newer, older], peers=ALONE, on_damaged=errors.append)
    assert isinstance(found, Checkpoint)
    assert (found.step, len(errors)) == (1, 1)


def test_a_valid_checkpoint_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    step_dir = _save(tmp_path, 3)
    before = (step_dir / "manifest.json").stat().st_mtime_ns
    _save(tmp_path, 3)
    assert (step_dir / "manifest.json").stat().st_mtime_ns == before
    next(step_dir.glob("model-*")).unlink()
    _save(tmp_path, 3)
    assert open_checkpoint(step_dir, peers=ALONE).step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_checkpoint_is_replaced_when_its_evaluation_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_dir = _save(tmp_path, 3, is_evaluation_due=True)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.startswith(".staging"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="Input/output error"):
        _save(tmp_path, 3)
    assert open_checkpoint(step_dir, peers=ALONE).position.is_evaluation_due
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    _save(tmp_path, 3)
    assert not open_checkpoint(step_dir, peers=ALONE).position.is_evaluation_due
    _save(tmp_path, 3, is_evaluation_due=True)
    assert not open_checkpoint(step_dir, peers=ALONE).position.is_evaluation_due, "never the other way"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_checkpoint_that_was_being_replaced_at_a_crash_is_there_again(tmp_path: Path) -> None:
    step_dir = _save(tmp_path, 3)
    step_dir.rename(tmp_path / ".replaced-step-00000003")
    sweep(tmp_path)
    assert open_checkpoint(step_dir, peers=ALONE).step == 3
    (tmp_path / ".replaced-step-00000003").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def export(staging: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step 4 was not saved.*No space left"):
        save(tmp_path, position=Position(step=4), share=share_of(_state()), export=export, aliases={}, peers=ALONE)
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_recipe_writes_may_lie_in_one_folder(tmp_path: Path) -> None:
    def save_with(step: int, name: str) -> Path:
        def export(staging: Path) -> None:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text("{}")

        share = share_of(_state())
        return save(tmp_path, position=Position(step=step), share=share, export=export, aliases={}, peers=ALONE)

    step_dir = save_with(1, "1_Pooling/config.json")
    assert open_checkpoint(step_dir, peers=ALONE).manifest.files["1_Pooling/config.json"].num_bytes == 2
    (step_dir / "1_Pooling/config.json").write_text("{ ")
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: .*digest"):
        open_checkpoint(step_dir, peers=ALONE)
    with pytest.raises(UserError, match=r"wrote 'a/b/c\.json': .*at most one folder deep"):
        save_with(2, "a/b/c.json")
    with pytest.raises(UserError, match=r"wrote '\.hidden'"):
        save_with(2, ".hidden/c.json")


def test_a_file_that_does_not_reach_the_disk_makes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fsync of a save in turn fails, up to that of the folder that the checkpoint was moved into."""
    fsync = os.fsync
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(fsync(descriptor)))
    files = {path.name for path in _save(tmp_path / "good", 1).iterdir()}
    num_calls = len(calls)
    assert num_calls == len(files) + 2  # the folder, and the one that it was moved into
    for failing in range(num_calls):
        calls.clear()

        def fsync_or_fail(descriptor: int, failing: int = failing) -> None:
            calls.append(None)
            if len(calls) == failing + 1:
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync_or_fail)
        folder = tmp_path / str(failing)
        with pytest.raises(UserError, match=r"step 1 was not saved.*Input/output error"):
            _save(folder, 1)
        assert checkpoint_steps(folder) == ([1] if failing == num_calls - 1 else [])
        assert not list(folder.glob(".*"))


def test_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 11):
        _save(tmp_path, step)
    (tmp_path / ".staging-step-00000012").mkdir()
    prune(tmp_path, newest=11, keep=0)
    assert checkpoint_steps(tmp_path) == [1, 2, 3, 10, 11]
    prune(tmp_path, newest=3, keep=2)
    assert checkpoint_steps(tmp_path) == [2, 3, 10, 11], "what was just saved stays, later ones do not count"
    prune(tmp_path, newest=11, keep=2, protected=[2])
    assert checkpoint_steps(tmp_path) == [2, 10, 11]
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_files_are_of_a_size_and_every_tensor_is_in_one() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 1000, (60,), generator=generator).tolist()
    specs = [TensorSpec(name=f"t{i}", section=MODEL, shape=(n,), dtype=torch.float32) for i, n in enumerate(sizes)]
    files = plan_files(specs, file_bytes=5000)
    assert [spec.name for file in files for spec in file.specs] == [spec.name for spec in specs]
    num_bytes = [sum(spec.num_bytes for spec in file.specs) for file in files]
    assert max(num_bytes) <= 5000
    assert all(n + after.specs[0].num_bytes > 5000 for n, after in zip(num_bytes, files[1:], strict=False))
    assert files[0].file_name == f"model-00001-of-{len(files):05d}.safetensors"
    (alone,) = plan_files(specs[:1], file_bytes=1)
    assert alone.num_bytes == len(alone.header) + specs[0].num_bytes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 64])
def test_ranks_that_hold_the_same_write_equal_shares(num_ranks: int) -> None:
    """Of tensors of all sizes and dtypes, over weights and optimizer together."""
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    shapes = [(999,), (), (3, 5), (0, 4), (70,), (1,), (400, 3)]
    fragments = [
        whole(f"t{i}", torch.zeros(shape, dtype=dtypes[i % 4]), section=section, entry=entry)
        for section, entry in ((MODEL, ""), (OPTIMIZER, "exp_avg"))
        for i, shape in enumerate(shapes * 5)
    ]
    shares = [own_pieces(fragments, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    of_each = {fragment.spec.key: [(0, 0)] for fragment in fragments}
    for share in shares:
        for piece in share:
            of_each[piece.spec.key].append((piece.start, piece.end))
    for fragment in fragments:
        ranges = sorted(of_each[fragment.spec.key])
        assert all(before[1] == after[0] for before, after in pairwise(ranges))
        assert ranges[-1][1] == fragment.spec.num_elements
    num_bytes = [sum((one.end - one.start) * one.values.element_size() for one in share) for share in shares]
    assert max(num_bytes) - min(num_bytes) <= 4 * 8


def test_names() -> None:
    assert step_of_dir_name(step_dir_name(7)) == 7
    assert step_of_dir_name("step-7") is None
    assert step_of_dir_name(".staging-step-00000007") is None
    assert not any(map(is_plain_file_name, ("", ".", "..", "../x", "a/b", "/x", ".hidden", "a\\b", "a\0b")))
    assert all(map(is_plain_file_name, ("model-00001-of-00002.safetensors", "tokenizer.json")))
    assert all(map(is_listed_file_name, ("tokenizer.json", "1_Pooling/config.json")))
    assert not any(map(is_listed_file_name, ("", "a/", "/a", "../a", "a/..", "a//b", "a/b/c", ".a/b", "a/.b")))

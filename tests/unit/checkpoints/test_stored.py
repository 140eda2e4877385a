"""Tensors that stay in their files: a range is read, and nothing else."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shardlaunch.checkpoints import tensorfile
from shardlaunch.checkpoints.mapped import in_files
from shardlaunch.checkpoints.stored import StoredTensors, shapes_of
from shardlaunch.checkpoints.weight_files import open_weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(24.0).reshape(4, 6), "b": torch.arange(5).to(torch.bfloat16)}, path)
    return path


def test_a_range_is_read_and_not_a_byte_more(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[tuple[int, int]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        opened = builtins.open(*args, **kwargs)  # noqa: SIM115 - closed below

        class Watched:
            def __enter__(self) -> "Watched":
                return self

            def __exit__(self, *_: object) -> None:
                opened.close()

            def seek(self, offset: int) -> None:
                opened.seek(offset)

            def readinto(self, view: memoryview) -> int:
                start = opened.tell()
                count: int = opened.readinto(view)
                touched.append((start, start + count))
                return count

        return Watched()

    place = open_weights(file, warn=print).places["a"]
    monkeypatch.setattr(tensorfile, "open", watched, raising=False)
    assert place.read(7, 11).tolist() == [7.0, 8.0, 9.0, 10.0]
    assert touched == [(place.entry.offset + 28, place.entry.offset + 44)]
    assert place.read(3, 3).tolist() == []
    assert len(touched) == 1


def test_stored_tensors_are_a_mapping_that_reads_when_asked(file: Path) -> None:
    stored = StoredTensors(places=open_weights(file, warn=print).places, dtype=torch.float32)
    assert shapes_of(stored) == {"a": (4, 6), "b": (5,)}
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"a": torch.float32, "b": torch.float32}
    assert torch.equal(stored["a"], torch.arange(24.0).reshape(4, 6))
    both = stored.renamed(str.upper) | {"A": torch.zeros(2), "c": torch.ones(1)}
    assert (both["A"].tolist(), list(both.places), both.pop("B").tolist()) == (
        [0.0, 0.0],
        ["B"],
        [0.0, 1.0, 2.0, 3.0, 4.0],
    )
    assert (sorted(both), sorted(stored)) == (["A", "c"], ["a", "b"])


def test_what_is_mapped_and_unchanged_is_found_in_its_file(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        tensors = {f"renamed.{name}": opened.get_slice(name)[...] for name in ("a", "b")}
    others = {"row": tensors["renamed.a"][1], "turned": tensors["renamed.a"].T, "wide": tensors["renamed.b"].float()}
    found = in_files(tensors | others)
    assert found.places.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in (tensors | others).items())
    tensors["renamed.a"][0] += 1  # the file does not have this
    assert not in_files(tensors).places
    assert torch.equal(load_file(file)["a"], torch.arange(24.0).reshape(4, 6))

"""Saves beside the training: of the state as it was, one at a time; errors are raised, the last one is awaited."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardlaunch import fit
from shardlaunch.checkpoints.shares import Snapshots, share_of
from shardlaunch.checkpoints.state import whole
from shardlaunch.launcher.runs import saver
from shardlaunch.launcher.runs.background import Background, Messages
from tests.recipes import NetRecipe

STUCK_S = 60
OPTIONS: dict[str, Any] = {"max_steps": 6, "save_every": 2, "threads_per_rank": 1, "tracker": "none", "keep": 0}


def _files(run_dir: Path, step: int) -> dict[str, bytes]:
    """Return the tensors of a checkpoint, and the digests of its manifest."""
    step_dir = run_dir / "checkpoints" / f"step-{step:08}"
    return {path.name: path.read_bytes() for path in step_dir.glob("*.safetensors*")}


class Watched(NetRecipe):
    """Tells when the training has come to its fourth step."""

    is_on = threading.Event()

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        if self.moment.step >= 3:
            self.is_on.set()
        return super().loss(outputs, batch)


def test_the_training_goes_on_and_what_is_saved_is_the_state_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 2 writes nothing until one more step is done."""
    fit(Watched, output_dir=tmp_path / "waiting", async_save="off", **OPTIONS)
    Watched.is_on.clear()
    save, saves = saver.save, []

    def late(*given: Any, **options: Any) -> Path:
        assert Watched.is_on.wait(STUCK_S), "the training waits"
        saves.append((options["position"].step, threading.current_thread().name))
        return save(*given, **options)

    monkeypatch.setattr(saver, "save", late)
    fit(Watched, output_dir=tmp_path / "beside", **OPTIONS)
    assert saves == [(2, "save"), (4, "save"), (6, "save")], "by default, and one after the other"
    for step in (2, 4, 6):
        assert _files(tmp_path / "beside", step) == _files(tmp_path / "waiting", step)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads share the priority of their process")
def test_only_the_thread_that_saves_gives_way_to_all_others() -> None:
    """So that steps take no longer where what trains and what writes share the cores."""
    background, found, before = Background(), [], os.getpriority(os.PRIO_PROCESS, 0)
    background.start(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())), name="save")
    background.wait()
    assert (found, os.getpriority(os.PRIO_PROCESS, 0)) == ([19], before)


def test_an_error_that_is_no_fault_of_a_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **options: Any) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr(saver, "save", fail)
    with pytest.raises(ZeroDivisionError):
        fit(NetRecipe, output_dir=tmp_path, **OPTIONS)


def test_a_copy_that_would_take_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    save, threads = saver.save, set()

    def noted(*given: Any, **options: Any) -> Path:
        threads.add(threading.current_thread() is threading.main_thread())
        return save(*given, **options)

    monkeypatch.setattr(saver, "save", noted)
    with pytest.warns(UserWarning, match=r"stands still during a save: .* half of the memory .* --async-save on"):
        fit(NetRecipe, output_dir=tmp_path / "auto", **OPTIONS)
    assert threads == {True}
    threads.clear()
    fit(NetRecipe, output_dir=tmp_path / "on", async_save="on", **OPTIONS)
    assert threads == {False}


def test_a_snapshot_is_a_copy_in_the_same_place_each_time() -> None:
    tensors = [torch.rand(7, 5), torch.tensor(True), torch.rand(3).bfloat16(), torch.tensor([2**62, -1])]
    snapshots, places = Snapshots(), set()
    for _ in range(2):
        share = share_of(whole(f"t{number}", tensor) for number, tensor in enumerate(tensors))
        copied = snapshots.of(share)
        expected = [tensor.clone().reshape(-1) for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        assert all(torch.equal(piece.values, one) for piece, one in zip(copied.pieces, expected, strict=True))
        places.add(copied.memory.data_ptr())
        tensors = [torch.ones_like(tensor) for tensor in tensors]
    assert len(places) == 1


def test_messages_of_other_threads_wait() -> None:
    said: list[str] = []
    messages, background = Messages(said.append), Background()
    background.start(lambda: messages("of another"), name="work")
    background.wait()
    messages("of this one")
    assert said == ["of this one"]
    messages.flush()
    assert said == ["of this one", "of another"]
    assert not background.is_busy

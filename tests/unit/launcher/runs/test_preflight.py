"""The output folder before a run trains: room on its disk, one folder for all hosts, locks that hold."""

import errno
import fcntl
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardlaunch import Options, UserError, fit
from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.reader import checkpoint_steps
from shardlaunch.launcher.runs import folder, preflight
from shardlaunch.launcher.runs.folder import claim
from shardlaunch.launcher.runs.preflight import Room, check_shared
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import World, connect, disconnect
from tests.distributed.ranks import run_on_ranks
from tests.recipes import NetRecipe

MB = 10**6
Usage = namedtuple("Usage", "total used free")


# free MB, checkpoints of 100 MB that are there, --keep, best, save_every, steps left: how many more are to come
@pytest.mark.parametrize(
    ("free", "num_there", "keep", "best", "save_every", "steps_left", "num_more"),
    [
        (399, 0, 2, True, 500, 5000, 4),  # two, one that is written, the best
        (400, 0, 2, True, 500, 5000, None),
        (299, 0, 2, False, 500, 5000, 3),
        (100, 3, 2, True, 500, 5000, None),  # what is there counts
        (150, 2, 2, True, 500, 5000, 2),
        (100, 9, 2, True, 500, 5000, None),
        (100, 0, 2, False, 0, 5000, None),  # one save in all
        (999, 0, 0, False, 500, 5000, 10),  # all are kept
        (999, 2, 0, False, 500, 4800, 10),
        (150, 0, 5, False, 500, 600, 2),
    ],
)
def test_room_for_what_is_to_come(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    num_there: int,
    keep: int,
    best: bool,
    save_every: int,
    steps_left: int,
    num_more: int | None,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free * MB))
    for step in range(num_there):
        (tmp_path / CHECKPOINTS / f"step-{step:08}").mkdir(parents=True)
    said: list[str] = []
    options = Options(keep=keep, save_on_best=best, save_every=save_every)
    room = Room(tmp_path, options, World(), warn=said.append)
    room.check(100 * MB, steps_left=steps_left, is_exact=True)
    room.check(100 * MB, steps_left=steps_left, is_exact=True)  # is said once
    assert len(said) == (num_more is not None)
    if num_more is not None:
        assert f"{free}.0 MB are free, but {num_more} more checkpoints of 100.0 MB" in said[0]


def test_no_room_for_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 99 * MB))
    room = Room(tmp_path, Options(), World(), warn=lambda text: None)
    with pytest.raises(UserError, match=r"99.0 MB are free; one checkpoint takes at least 100.0 MB"):
        room.check(100 * MB, steps_left=1, is_exact=False)


def test_the_size_is_that_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and buffers, and what AdamW keeps: known after the first step, and at a resume before it."""
    options: dict[str, Any] = {"output_dir": tmp_path, "max_steps": 3, "save_every": 1, "keep": 1, "eval_every": 9}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3000))
    with (
        pytest.warns(UserWarning, match="3 more checkpoints of at least 2.3 kB"),
        pytest.raises(UserError, match=r"3.0 kB are free; one checkpoint takes 7.* kB"),
    ):
        fit(NetRecipe, **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10_000))
    with pytest.warns(UserWarning, match=r"10.0 kB are free, but 3 more checkpoints of 7.* kB"):
        fit(NetRecipe, **options, stop_at_step=1)
    sizes = []
    monkeypatch.setattr(Room, "_check", lambda self, num_bytes, *_: sizes.append(num_bytes))
    fit(NetRecipe, **options, stop_at_step=2)
    at_resume, after_a_step = sizes
    (step_dir,) = (tmp_path / CHECKPOINTS).iterdir()
    assert at_resume > after_a_step > 4 * 3 * 500
    assert after_a_step < sum(path.stat().st_size for path in step_dir.glob("*.safetensors")) < at_resume


def test_a_resume_prunes(tmp_path: Path) -> None:
    """Also what a run with a larger --keep, or one that was killed as it pruned, has left; and nothing more."""
    options: dict[str, Any] = {"output_dir": tmp_path, "max_steps": 8, "eval_every": 3, "threads_per_rank": 1}
    fit(NetRecipe, **options, save_every=1, keep=0, stop_at_step=7)
    best = fit(NetRecipe, **options, keep=0, stop_at_step=7).best_checkpoint
    assert best is not None
    (tmp_path / CHECKPOINTS / ".trash-step-00000009").mkdir()
    (tmp_path / CHECKPOINTS / "step-00000007" / "manifest.json").unlink()  # it is damaged: step 6 is resumed from
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        fit(NetRecipe, **options, save_every=0, keep=2, stop_at_step=6)
    steps = {int(best.name.removeprefix("step-")), 5, 6, 7}
    assert checkpoint_steps(tmp_path / CHECKPOINTS) == sorted(steps)
    assert len(list((tmp_path / CHECKPOINTS).iterdir())) == len(steps)


def test_another_runs_checkpoints_are_not_pruned(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "eval_every": 9, "threads_per_rank": 1}
    fit(NetRecipe, output_dir=tmp_path / "one", **options, save_every=1, keep=0, stop_at_step=3)
    fit(NetRecipe, output_dir=tmp_path / "two", **options, keep=1, resume=str(tmp_path / "one"))
    assert checkpoint_steps(tmp_path / "one" / CHECKPOINTS) == [1, 2, 3]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_folder_without_locks_is_used_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    said: list[str] = []
    with claim(tmp_path / "run", warn=said.append):
        assert (tmp_path / "run" / CHECKPOINTS).is_dir()
    assert len(said) == 1
    assert f"cannot be locked ({os.strerror(number)})" in said[0]


def _on_hosts(folders: list[Path], lock_holds: bool) -> tuple[str, list[str]]:
    """Check the folder as ranks that are one host each; return the error and the warnings."""
    world = connect(read_environment())
    world = replace(world, local_ranks=range(world.rank, world.rank + 1))
    if not lock_holds:
        preflight.lock = lambda descriptor: None
    preflight.SEEN_WITHIN_S = 0.3
    output_dir, said = folders[world.rank], []
    error = ""
    try:
        if world.is_main:
            with claim(output_dir, warn=said.append):
                check_shared(output_dir, world, warn=said.append)
        else:
            check_shared(output_dir, world, warn=said.append)
    except UserError as refusal:
        error = str(refusal)
    disconnect(world)
    return error, said


def test_hosts_with_one_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (error, said), (other_error, _) = run_on_ranks(2, _on_hosts, [run_dir, run_dir], True)
    assert (error, other_error, said) == ("", "", [])
    assert not run_dir.exists(), "nothing is left of a run that was refused later"
    (error, said), _ = run_on_ranks(2, _on_hosts, [run_dir, run_dir], False)
    assert error == ""
    assert "its lock does not hold between hosts" in said[0]


def test_hosts_with_a_folder_each_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other host has a folder of the same name."""
    for number, exists in enumerate((False, True)):
        folders = [tmp_path / f"{number}-{host}" for host in range(2)]
        if exists:
            (folders[1] / CHECKPOINTS).mkdir(parents=True)
        for error, _ in run_on_ranks(2, _on_hosts, folders, True):
            assert f"--output-dir {folders[1]}: is not shared between the hosts: rank 1" in error
        assert not list(tmp_path.rglob(".shared-*"))


def test_one_host_needs_no_check(tmp_path: Path) -> None:
    check_shared(tmp_path / "none", World(), warn=lambda text: None)
    assert folder.LOCK


def test_what_a_killed_check_has_left_goes_at_the_next_start(tmp_path: Path) -> None:
    for name in (".shared-0a8ddff535777830", ".written-0a8ddff535777830", "kept"):
        (tmp_path / name).touch()
    check_shared(tmp_path, World(), warn=lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]

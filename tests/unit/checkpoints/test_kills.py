"""A copy or a deletion that is killed at any of its file-system calls leaves nothing that is taken for a checkpoint."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardlaunch import UserError
from shardlaunch.checkpoints.copying import copy_in, copy_out
from shardlaunch.checkpoints.finding import runs_at
from shardlaunch.checkpoints.pruning import carry_out, plan_pruning
from shardlaunch.checkpoints.verifying import verify
from tests.unit.checkpoints.saved import flip, save_step, weights_file

KILLED = 9
STRIDE = int(os.environ.get("SHARDLAUNCH_KILL_STRIDE", "6"))
"""Of the calls, one in so many; 1: all of them."""


def _killed_at(call: int, folder: Path, work: Callable[[], object]) -> bool:
    """Run `work` in a fork that ends without a word at its `call`th call below `folder`. Return whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which wait
        process = os.fork()
    if not process:
        left = call

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if any(str(one).startswith(str(folder)) for one in arguments):
                left -= 1
                if left == 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == KILLED


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_copy_that_is_killed_at_any_call_is_no_checkpoint_and_is_completed(tmp_path: Path) -> None:
    step_dir = save_step(tmp_path / "a", 5)
    for is_damaged in (False, True):
        for call in range(1 + is_damaged, 500, STRIDE):
            place = tmp_path / f"{is_damaged}-{call}"
            target = place / step_dir.name
            if is_damaged:
                copy_out(step_dir, str(target))
                flip(weights_file(target))
            killed = _killed_at(call, place, lambda: copy_out(step_dir, str(target), num_threads=1))  # noqa: B023
            if not killed:
                assert verify(target).is_valid
                break
            if target.exists() and not verify(target).is_valid:
                assert is_damaged
                assert len(_contents(target)) == len(_contents(step_dir))  # as it was
            copy_in(str(step_dir), target)
            assert _contents(target) == _contents(step_dir)
            assert os.listdir(place) == [target.name]
        assert 20 < call < 400


def test_a_deletion_that_is_killed_at_any_call_leaves_whole_checkpoints(tmp_path: Path) -> None:
    for call in range(1, 500, STRIDE):
        folder = tmp_path / f"{call}"
        for step in (2, 4, 6):
            save_step(folder, step)
        (folder / ".staging-step-00000008").mkdir()
        (run,) = runs_at(folder)
        pruning = plan_pruning(run, keep=1)
        if not _killed_at(call, folder, lambda: carry_out(pruning)):  # noqa: B023
            break
        assert verify(folder / "step-00000006").is_valid
        assert all(verify(path).is_valid for path in run.step_dirs())
        try:
            carry_out(plan_pruning(run, keep=1))
        except UserError as error:
            raise AssertionError(str(error)) from error
        assert os.listdir(folder) == ["step-00000006"]
    assert 10 < call < 400

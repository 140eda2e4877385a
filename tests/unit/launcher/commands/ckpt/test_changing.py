"""`ckpt prune` never deletes what is needed; `ckpt copy` copies runs as they are."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.checkpoints.saved import flip, save_step, weights_file
from tests.unit.launcher.commands.ckpt.conftest import Ckpt, make_run


def _steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run", (2, 4, 6, 8, 10))
    (run / "checkpoints" / ".staging-step-00000012").mkdir()
    (run / "checkpoints" / ".trash-step-00000001").mkdir()
    ended = ckpt("prune", run, "--keep", 2, "--dry-run", "--json")
    (plan,) = ended.document["runs"]
    assert ended.status == 0
    assert [Path(path).name for path in plan["kept"]] == ["step-00000010", "step-00000008"]
    assert Path(plan["best"]).name == "step-00000004"
    assert [Path(path).name for path in plan["deleted"]] == ["step-00000006", "step-00000002"]
    assert _steps(run) == [2, 4, 6, 8, 10]
    assert "would delete  step-00000006" in ckpt("prune", run, "--keep", 2, "--dry-run").out
    assert len(os.listdir(run / "checkpoints")) == 7
    ended = ckpt("prune", run, "--keep", 2)
    assert ended.status == 0
    assert "keep    step-00000004 (best)" in ended.out
    assert sorted(os.listdir(run / "checkpoints")) == [f"step-{step:08d}" for step in (4, 8, 10)]
    assert ckpt("prune", run / "checkpoints", "--keep", 1).status == 0
    assert _steps(run) == [4, 10]


def test_what_a_save_had_no_time_to_replace_is_restored(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run")
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / ".replaced-step-00000006")
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".replaced-step-00000004")
    listed = ckpt("list", run)
    assert listed.status == 0
    assert ".replaced-step-00000006: not finished" in listed.out
    assert "would restore or delete  .replaced-step-00000006" in ckpt("prune", run, "--keep", 2, "--dry-run").out
    assert ckpt("prune", run, "--keep", 2).status == 0
    assert sorted(os.listdir(checkpoints)) == ["step-00000002", "step-00000004", "step-00000006"]


def test_prune_counts_only_what_is_valid_to_the_last_bit(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run", (2, 4, 6, 8), best=8)
    flip(weights_file(run / "checkpoints" / "step-00000008"))
    (run / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    ended = ckpt("prune", run, "--keep", 1)
    assert ended.status == 1
    assert "damaged, stays: " in ended.out
    assert _steps(run) == [4, 6, 8]
    flip(weights_file(run / "checkpoints" / "step-00000004"))
    before = _steps(run)
    ended = ckpt("prune", run, "--keep", 1)
    assert (ended.status, _steps(run)) == (1, before)
    assert "no valid checkpoint" in ended.err


_HOLD = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_nothing_is_changed_in_the_folder_of_a_run_that_goes_on(tmp_path: Path, ckpt: Ckpt) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", (2, 4, 6, 8))
    words = [sys.executable, "-c", _HOLD, str(run / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for refused in (("prune", run, "--keep", 1), ("copy", other, run)):
            ended = ckpt(*refused)
            assert (ended.status, ended.out) == (2, "")
            assert "a run is using this folder" in ended.err
        assert ckpt("prune", run, "--keep", 1, "--dry-run").status == 0
        assert ckpt("copy", run, tmp_path / "copy").status == 0
        holder.communicate("")
    assert _steps(run) == [2, 4, 6]
    assert ckpt("prune", run, "--keep", 1).status == 0
    with open(run / ".lock", "r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("prune", "run", "--keep", "0"), "--keep 0: must be at least 1"),
        (("prune", "run/checkpoints/step-00000002", "--keep", "1"), "is one checkpoint"),
        (("prune", "nothing", "--keep", "1"), "nothing: no such folder"),
        (("copy", "nothing", "x"), "nothing: no such folder"),
        (("copy", "run", "run"), "is the source of the copy"),
        (("copy", "run", "run/x"), "is in the source of the copy"),
        (("copy", "run", "other"), "holds another run"),
        (("copy", "run", "x", "--step", "3"), "has no checkpoint of step 3; it has 2, 4"),
        (("copy", "run/best", "x", "--step", "3"), "is a checkpoint already"),
        (("copy", "run", "s4://bucket"), "Protocol not known"),
        (("copy", "run", "/proc/none"), "/proc/none"),
        (("copy", "folder", "x"), "neither a run nor a checkpoint"),
    ],
)
def test_what_cannot_be_done_is_refused(
    words: tuple[str, ...], complaint: str, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", (2, 4))
    other = make_run(tmp_path / "other", (6,), best=6)
    (other / "run.json").write_text((other / "run.json").read_text().replace("0.1", "0.3"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    before = {path: path.stat().st_size for path in sorted(tmp_path.rglob("*"))}
    ended = ckpt(*words)
    assert (ended.status, ended.out) == (2, "")
    assert complaint in ended.err
    assert ended.err.count("\n") == 1
    assert {path: path.stat().st_size for path in sorted(tmp_path.rglob("*"))} == before


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_runs_are_copied_there_and_back(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "folds" / "fold-1")
    make_run(tmp_path / "folds" / "fold-2", (2,), best=2)
    (tmp_path / "folds" / "folds.json").write_text("{}")
    for name in ("folds", "folds/fold-1", "folds/fold-1/checkpoints", "folds/fold-1/checkpoints/step-00000004"):
        source = tmp_path / name
        assert ckpt("copy", source, f"memory://{name}").status == 0
        assert ckpt("copy", f"memory://{name}", tmp_path / "back" / name).status == 0
        assert _contents(tmp_path / "back" / name) == _contents(source)
        ended = ckpt("copy", f"memory://{name}", tmp_path / "back" / name, "--json")
        assert all(one["num_skipped"] == one["num_files"] for one in ended.document["checkpoints"])
    assert ckpt("copy", run / "best", tmp_path / "mine").status == 0
    assert ckpt("show", tmp_path / "mine", "--json").document["step"] == 4
    assert ckpt("copy", run, tmp_path / "one", "--step", 4).status == 0
    assert _steps(tmp_path / "one") == [4]
    # The copy goes on with the run, of which it is a copy.
    save_step(run / "checkpoints", 8)
    assert ckpt("copy", run, tmp_path / "back" / "folds" / "fold-1").status == 0
    assert _contents(tmp_path / "back" / "folds" / "fold-1") == _contents(run)


def test_a_damaged_checkpoint_does_not_stop_the_copy_of_a_run(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run")
    flip(weights_file(run / "checkpoints" / "step-00000002"))
    (run / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    (run / "checkpoints" / "step-00000006" / "notes.txt").write_text("")
    ended = ckpt("copy", run, tmp_path / "copy", "--json")
    assert ended.status == 1
    assert [one["step"] for one in ended.document["checkpoints"]] == [6]
    assert len(ended.document["failed"]) == 2
    assert "not copied: notes.txt" in ended.err
    assert os.listdir(tmp_path / "copy" / "checkpoints") == ["step-00000006"]
    for word in ("file is damaged", "no manifest.json"):
        assert word in ended.err

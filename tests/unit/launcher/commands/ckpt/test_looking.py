"""`ckpt list`, `ckpt verify` and `ckpt show` say what is there, and which file is damaged and how."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardlaunch.checkpoints import verifying
from shardlaunch.checkpoints.retention import prune
from shardlaunch.checkpoints.verifying import Verdict, verify
from shardlaunch.launcher.commands.ckpt import looking
from tests.unit.checkpoints.saved import flip, save_step, weights_file
from tests.unit.launcher.commands.ckpt.conftest import Ckpt, make_run
from tests.unit.launcher.test_imports import imported


def test_a_list_has_metrics_the_best_one_and_what_is_not_valid(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run")
    ended = ckpt("list", run)
    assert (ended.status, ended.err) == (0, "")
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[0] == [str(run)]
    assert rows[1] == ["step", "size", "age", "loss", "eval/loss", "eval/accuracy"]
    assert [(row[0], row[5:]) for row in rows[2:5]] == [
        ("2", ["0.5000", "1.0000", "0.2500"]),
        ("4", ["0.2500", "0.5000", "0.5000", "best"]),
        ("6", ["0.1667", "0.3333", "0.7500"]),
    ]
    assert "3 of 3 valid (manifest and sizes" in ended.out
    # The content of a file is looked at with --verify only; the best one is the newest valid one's.
    flip(weights_file(run / "checkpoints" / "step-00000002"))
    os.truncate(weights_file(run / "checkpoints" / "step-00000006"), 20)
    ended = ckpt("list", run, "--json")
    (listed,) = ended.document["runs"]
    assert ended.status == 1
    assert [(row["step"], row["is_valid"], row["is_best"]) for row in listed["checkpoints"]] == [
        (2, True, False),
        (4, True, True),
        (6, False, False),
    ]
    assert "model-00001-of-00001.safetensors: cut short: 20 of" in listed["checkpoints"][2]["reason"]
    assert listed["checkpoints"][1]["metrics"] == {"loss": 0.25, "eval/loss": 0.5, "eval/accuracy": 0.5}
    ended = ckpt("list", run, "--verify")
    assert ended.status == 1
    assert "not valid: model-00001-of-00001.safetensors: its content has changed, in the tensors' data" in ended.out
    assert "1 of 3 valid (all digests)" in ended.out


def test_a_list_of_what_a_path_means(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "folds").mkdir()
    for fold in (1, 2, 10):
        (tmp_path / "folds" / f"fold-{fold}").symlink_to(run)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)

    def steps(path: object) -> list[list[int]]:
        ended = ckpt("list", path, "--json")
        assert ended.status == 0
        return [[row["step"] for row in one["checkpoints"]] for one in ended.document["runs"]]

    assert steps(run) == steps(run / "checkpoints") == [[2, 4, 6]]
    assert steps(run / "checkpoints" / "step-00000004") == steps(run / "best") == [[4]]
    assert steps(tmp_path / "folds") == [[2, 4, 6]] * 3
    assert [one["run"][-7:] for one in ckpt("list", tmp_path / "folds", "--json").document["runs"]] == [
        "/fold-1",
        "/fold-2",
        "fold-10",
    ]
    assert steps(tmp_path / "new") == [[]]
    assert "no checkpoints" in ckpt("list", tmp_path / "new").out
    save_step(tmp_path / "alone", 3).rename(tmp_path / "alone" / "mine")
    assert steps(tmp_path / "alone" / "mine") == [[3]]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("list", "nowhere"), "nowhere: no such folder"),
        (("list", "."), "neither a run"),
        (("list", "run/run.json"), "is a file"),
        (("list", "s3://bucket/run"), "a URL, which only `shardlaunch ckpt copy` takes"),
        (("verify", "run", "--step", "3"), "has no checkpoint of step 3; it has 2, 4, 6"),
        (("verify", "new"), "no checkpoint in this folder"),
        (("show", "new"), "no checkpoint in this folder"),
        (("show", "folds"), "is a cross-validation; choose a fold, such as folds/fold-1"),
        (("show", "run/checkpoints/step-00000002", "--step", "2"), "is a checkpoint already"),
        (("show", "plain/best"), "has no best checkpoint"),
        (("show", "run/best/best"), "is a checkpoint already"),
    ],
)
def test_what_is_no_run_is_refused_in_one_message(
    words: tuple[str, ...], complaint: str, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    save_step(tmp_path / "plain" / "checkpoints", 2)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    for fold in ("fold-1", "fold-2"):
        (tmp_path / "folds" / fold / "checkpoints").mkdir(parents=True)
    ended = ckpt(*words)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert complaint in ended.err
    assert ended.err.count("\n") == 1


def _version_9(step_dir: Path) -> None:
    manifest = step_dir / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 4', '"version": 9'))


def _pipe(step_dir: Path) -> None:
    weights_file(step_dir).unlink()
    os.mkfifo(step_dir / "model-00001-of-00001.safetensors")


def _header(step_dir: Path) -> None:
    path = weights_file(step_dir)
    path.write_bytes(path.read_bytes().replace(b"layer.weight", b"layer.freight"[:12]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "flipped": (lambda d: flip(weights_file(d)), "model-00001-of-00001.safetensors", "in the tensors' data"),
    "header": (
        _header,
        "model-00001-of-00001.safetensors",
        "its header too: tensor 'layer.freigh' is only in the file",
    ),
    "short": (lambda d: os.truncate(weights_file(d), 9), "model-00001-of-00001.safetensors", "cut short: 9 of"),
    "sparse": (
        lambda d: os.truncate(weights_file(d), 1 << 40),
        "model-00001-of-00001.safetensors",
        "bytes too many",
    ),
    "missing": (lambda d: weights_file(d).unlink(), "model-00001-of-00001.safetensors", "No such file"),
    "pipe": (_pipe, "model-00001-of-00001.safetensors", "is a pipe"),
    "state": (lambda d: flip(d / "trainer_state.json"), "trainer_state.json", "its content has changed"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json", "no manifest.json"),
    "half a manifest": (lambda d: os.truncate(d / "manifest.json", 100), "manifest.json", "not a readable manifest"),
    "version": (_version_9, "manifest.json", "version 9 is not supported; this release reads"),
    "another step": (lambda d: d.rename(d.with_name("step-00000003")), "manifest.json", "holds step 2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_the_file_and_how_it_is_damaged(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    damage, file, what = DAMAGES[name]
    run = make_run(tmp_path / "run", (2, 6), best=6)
    assert ckpt("verify", run).status == 0
    damage(run / "checkpoints" / "step-00000002")
    ended = ckpt("verify", run, "--json")
    assert ended.status == 1
    damaged, valid = ended.document["checkpoints"]
    assert (valid["is_valid"], valid["damages"]) == (True, [])
    assert not damaged["is_valid"]
    assert [one["file"] for one in damaged["damages"]] == [file]
    assert what in damaged["damages"][0]["what"]
    assert what in ckpt("verify", run).out
    assert ckpt("list", run, "--verify").status == 1
    # Of one checkpoint nothing is shown, of the run the newest that is valid.
    assert ckpt("show", run).status == 0


def test_files_that_are_not_of_the_checkpoint_are_named(tmp_path: Path, ckpt: Ckpt) -> None:
    step_dir = save_step(tmp_path, 2)
    (step_dir / "notes.txt").write_text("")
    ended = ckpt("verify", step_dir)
    assert ended.status == 0
    assert "not of the checkpoint: notes.txt" in ended.out


def test_an_error_of_the_file_system_is_one_message(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")

    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refused)
    for words in (("list", run), ("verify", run), ("diff", run, run), ("prune", run, "--keep", 1)):
        ended = ckpt(*words)
        assert (ended.status, ended.out, ended.err) == (2, "", f"error: {run}/manifest.json: Permission denied\n")


def test_show_has_all_of_a_checkpoint(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run", aliases={"head.weight": "layer.weight"})
    ended = ckpt("show", run / "best", "--json")
    assert (ended.status, ended.err) == (0, "")
    shown = ended.document
    assert (shown["step"], shown["recipe"], shown["options"]["lr"]) == (4, "mnist_mlp.MnistMlp", 0.1)
    assert shown["position"]["best_step"] == 4
    assert shown["versions"] == {"torch": "2.13.0"}
    assert shown["sections"]["model"] == {"tensors": 5, "elements": 49, "bytes": 4 * 48 + 8}
    assert shown["sections"]["optimizer"]["tensors"] == 1
    assert shown["elements_with_optimizer_state"] == 32
    assert shown["aliases"] == {"head.weight": "layer.weight"}
    assert {
        "name": "layer.weight",
        "section": "optimizer",
        "entry": "exp_avg",
        "shape": [8, 4],
        "dtype": "F32",
        "file": "optimizer-00001-of-00001.safetensors",
    } in shown["tensors"]
    text = ckpt("show", run, "--step", 2).out
    for line in ("step 2 of mnist_mlp.MnistMlp", "layer.weight", "8x4", "head.weight is layer.weight"):
        assert line in text
    os.truncate(weights_file(run / "checkpoints" / "step-00000006"), 20)
    ended = ckpt("show", run)
    assert ended.status == 0
    assert "step 4 of" in ended.out
    assert ended.err.startswith("warning: skipped a damaged checkpoint: ")
    ended = ckpt("show", run, "--step", 6)
    assert (ended.status, ended.out) == (1, "")


def test_a_run_that_goes_on_is_not_disturbed_and_not_damaged(tmp_path: Path, ckpt: Ckpt) -> None:
    """Saves and deletions go on while its checkpoints are looked at."""
    run = make_run(tmp_path / "run", (1, 2), best=1)
    ends, failures = threading.Event(), []

    def goes_on() -> None:
        try:
            for step in range(3, 200):
                save_step(run / "checkpoints", step)
                prune(run / "checkpoints", newest=step, keep=2)
                if ends.is_set():
                    break
        except Exception as error:
            failures.append(error)

    saving = threading.Thread(target=goes_on)
    saving.start()
    try:
        for number in range(12):
            for words in (("list", run), ("list", run, "--verify"), ("verify", run)):
                ended = ckpt(*words)
                assert ended.status == 0, ended.out
            if number % 4 == 0:
                ended = ckpt("copy", run, tmp_path / f"copy-{number}")
                assert ended.status == 0 or "was deleted while it was copied" in ended.err, ended.err
    finally:
        ends.set()
        saving.join()
    assert not failures
    assert ckpt("verify", run).status == 0


@pytest.mark.parametrize(
    "name",
    ["read_listing", "regular_size", "digest_file", "read_stored", "header_bytes", "read_position", "read_record"],
)
def test_a_checkpoint_that_is_deleted_while_it_is_verified_is_not_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_dir = make_run(tmp_path / "run") / "checkpoints" / "step-00000002"
    read = getattr(verifying, name)

    def gone(*args: Any, **options: Any) -> Any:
        shutil.rmtree(step_dir, ignore_errors=True)
        return read(*args, **options)

    monkeypatch.setattr(verifying, name, gone)
    verdict = verify(step_dir)
    assert not step_dir.exists()
    assert (verdict.is_gone, verdict.damages) == (True, ())


def test_a_checkpoint_that_is_deleted_after_it_was_verified_is_not_damaged(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")

    def verified(step_dir: Path) -> Verdict:
        verdict = verify(step_dir)
        shutil.rmtree(step_dir)
        return verdict

    monkeypatch.setattr(looking, "verify", verified)
    ended = ckpt("verify", run)
    assert ended.status == 0, ended.err
    assert "deleted meanwhile" in ended.out


@pytest.mark.parametrize("words", ["--help", "list {0}", "verify {0}", "show {0}", "copy {0} {0}-copy"])
def test_looking_and_copying_needs_no_torch(words: str, tmp_path: Path) -> None:
    step_dir = save_step(tmp_path, 2).rename(tmp_path / "mine")
    code = f"""
import contextlib, io, runpy, sys
sys.argv = ["shardlaunch", "ckpt", *{words.format(step_dir).split()!r}]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        runpy.run_module("shardlaunch", run_name="__main__")
"""
    packages = imported(code)
    assert "shardlaunch" in packages
    assert not packages & {"torch", "numpy", "transformers", "fsspec"}
    assert (tmp_path / "mine-copy").exists() is words.startswith("copy")

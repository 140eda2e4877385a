"""Damaged, copied, mixed and strange files of runs and checkpoints: passed over or refused, each named."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardlaunch import UserError, fit
from shardlaunch.checkpoints.layout import CHECKPOINTS, MANIFEST, TRAINER_STATE, step_dir_name
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import newest_complete, newest_valid, open_checkpoint, open_path
from shardlaunch.checkpoints.records import as_meant, to_json
from shardlaunch.checkpoints.verifying import verify
from shardlaunch.checkpoints.weight_files import open_weights
from shardlaunch.errors import printable, some
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.tracking import MetricsLog, read_metrics
from shardlaunch.launcher.runs.result import Result
from tests.faults.records import BEFORE, INDEX, NEWEST, OPTIONS, Target, run
from tests.recipes import NetRecipe
from tests.unit.checkpoints.saved import flip

ALONE = Peers()


def no_warning(text: str) -> None:
    """Fail, because nothing is to be warned of."""
    raise AssertionError(text)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Return a run of three steps, for all tests of this file."""
    return Target(tmp_path_factory.mktemp("records"))


@pytest.fixture
def target(shared: Target) -> Iterator[Target]:
    """Return the run, whose files are put back at the end."""
    yield shared
    shared.restore()


def test_no_damage_is_a_traceback() -> None:
    counts = run(200, seed=1, say=lambda text: None)
    assert counts["passed over"] > 80
    assert counts["refused"] > 5


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name(".pipe")), path.symlink_to(".pipe")),
    "a link out": lambda path: path.symlink_to("/etc/hostname"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a file without an end": lambda path: path.touch() or os.truncate(path, 1 << 42),
    "no file": lambda path: None,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_stands_in_place_of_a_file_is_named_and_never_read(kind: str, target: Target) -> None:
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in list(target.files):
        path.unlink()
        STRANGE[kind](path)
        warnings: list[str] = []
        if path.parent == target.step_dir:
            found = newest_valid(target.run_dir / CHECKPOINTS, peers=ALONE, warn=warnings.append)
            assert found is not None
            assert found.step == BEFORE
            assert path.name in warnings[0]
            looks = newest_complete(target.run_dir / CHECKPOINTS)
            assert looks == found.step_dir, kind
            with pytest.raises(UserError, match=path.name):
                open_path(target.step_dir, peers=ALONE, warn=no_warning)
        elif kind != "no file":
            with pytest.raises(UserError, match=path.name):
                fit(NetRecipe, output_dir=target.run_dir, **OPTIONS)
        (path.parent / ".pipe").unlink(missing_ok=True)
        target.restore()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200_000


def test_a_copy_of_a_checkpoint_is_not_the_step_of_its_folders_name(target: Target) -> None:
    copy = target.step_dir.with_name(step_dir_name(6))
    link = target.step_dir.with_name(step_dir_name(7))
    for make in (lambda: shutil.copytree(target.step_dir, copy), lambda: link.symlink_to(target.step_dir)):
        make()
        warnings: list[str] = []
        found = newest_valid(target.run_dir / CHECKPOINTS, peers=ALONE, warn=warnings.append)
        assert found is not None
        assert (found.step, len(warnings)) == (NEWEST, 1)
        assert f"holds step {NEWEST}; is it a copy?" in warnings[0]
        assert Result.of_folder(target.run_dir).step == NEWEST
        shutil.rmtree(copy, ignore_errors=True)
        link.unlink(missing_ok=True)
    # The state of another step, with its digest in the manifest.
    state = json.loads((target.step_dir / TRAINER_STATE).read_bytes())
    (target.step_dir / TRAINER_STATE).write_text(json.dumps({**state, "step": 6}))
    target.sign(target.step_dir / TRAINER_STATE)
    with pytest.raises(UserError, match=r"trainer_state.json: is of step 6, the manifest of step 3"):
        open_checkpoint(target.step_dir, peers=ALONE)
    named = target.step_dir.with_name("my-best")
    target.restore()
    shutil.copytree(target.step_dir, named)
    assert open_checkpoint(named, peers=ALONE).step == NEWEST
    shutil.rmtree(named)


def test_names_of_folders_that_are_no_steps(target: Target) -> None:
    folder = target.step_dir.parent
    for name in ("step-٠٠٠٠٠٠٠٩", "step-000000009", "step-9", "step-00000009x"):
        (folder / name).mkdir()
    found = newest_valid(folder, peers=ALONE, warn=no_warning)
    assert found is not None
    assert found.step == NEWEST
    for name in ("step-٠٠٠٠٠٠٠٩", "step-000000009", "step-9", "step-00000009x"):
        (folder / name).rmdir()


def _without_optimizer(target: Target, *, version: int, recount: bool = False) -> None:
    """Take the optimizer's tensors out of the newest checkpoint, as a tool would that publishes models."""
    path = target.step_dir / MANIFEST
    body = json.loads(path.read_bytes())
    body["tensors"] = [tensor for tensor in body["tensors"] if tensor["section"] == "model"]
    body["files"] = {name: entry for name, entry in body["files"].items() if not name.startswith("optimizer")}
    if recount:
        del body["num_tensors"]["optimizer"]
    if version < 3:
        del body["num_tensors"]
    path.write_text(json.dumps({**body, "version": version}))
    target.sign()


def test_a_checkpoint_without_optimizer_state_is_not_resumed_silently(target: Target, tmp_path: Path) -> None:
    _without_optimizer(target, version=4)
    with pytest.raises(UserError, match=r"lists other tensors than the \{.*'optimizer': \d+\} that were saved"):
        open_checkpoint(target.step_dir, peers=ALONE)
    for version in (4, 3, 2):
        target.restore()
        _without_optimizer(target, version=version, recount=version >= 3)
        copy = Path(shutil.copytree(target.run_dir, tmp_path / str(version)))
        with pytest.warns(UserWarning, match="holds no optimizer state, so that AdamW starts anew"):
            fit(NetRecipe, output_dir=copy, **OPTIONS)


def test_an_optimizer_that_keeps_no_state_resumes_without_a_word(tmp_path: Path) -> None:
    given = {**OPTIONS, "optimizer": "sgd", "output_dir": tmp_path}
    fit(NetRecipe, **given, stop_at_step=1)
    assert fit(NetRecipe, **given).step == 4


def test_checkpoints_of_earlier_versions_are_read(target: Target) -> None:
    expected = open_checkpoint(target.step_dir, peers=ALONE)
    position = expected.position
    path, state = target.step_dir / MANIFEST, target.step_dir / TRAINER_STATE
    body = json.loads(path.read_bytes())
    path.write_text(json.dumps({**body, "version": 3}))
    target.sign()
    third = open_checkpoint(target.step_dir, peers=ALONE, checks_tensors=False)
    assert (third.manifest.tensors, third.position) == (expected.manifest.tensors, position)
    for spec in expected.specs():
        assert torch.equal(third.read(spec, 0, spec.num_elements), expected.read(spec, 0, spec.num_elements))
    flip(target.weights)
    with pytest.raises(UserError, match="digest"):  # without digests of tensors all is checked at once
        open_checkpoint(target.step_dir, peers=ALONE, checks_tensors=False)
    flip(target.weights)
    del body["num_tensors"]
    path.write_text(json.dumps({**body, "version": 2}))
    target.sign()
    second = open_checkpoint(target.step_dir, peers=ALONE)
    assert (second.manifest.tensors, second.position) == (expected.manifest.tensors, position)
    for tensor in body["tensors"]:
        section, entry = tensor.pop("section"), tensor.pop("entry")
        tensor["kind"] = "weight" if section == "model" else entry
    path.write_text(json.dumps({**body, "version": 1}))
    saved = json.loads(state.read_bytes())
    saved["group_numbers"], saved["constants"] = saved.pop("group_hyperparameters"), saved.pop("non_persistent_buffers")
    del saved["has_stopped_early"]
    state.write_text(json.dumps(saved))
    target.sign(state)
    first = open_checkpoint(target.step_dir, peers=ALONE)
    assert (first.manifest.tensors, first.position) == (expected.manifest.tensors, position)


def test_a_digest_of_a_tensor_that_is_not_its_own_makes_a_checkpoint_damaged(target: Target) -> None:
    path = target.step_dir / MANIFEST
    body = json.loads(path.read_bytes())
    body["tensors"][0]["crc64nvme"] = f"{1:016x}"
    path.write_text(json.dumps(body))
    target.sign()
    for checks_tensors in (True, False):
        with pytest.raises(UserError, match="manifest"):
            open_checkpoint(target.step_dir, peers=ALONE, checks_tensors=checks_tensors)
    assert "its tensors" in verify(target.step_dir).damages[0].what


def test_a_file_beside_the_manifests_own_is_not_read(target: Target) -> None:
    expected = load_file(target.weights)
    stray = target.step_dir / "model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in expected.items()}, stray)
    weights = open_weights(target.step_dir, warn=no_warning)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())
    stray.unlink()


def test_an_index_and_files_that_disagree(target: Target, tmp_path: Path) -> None:
    shutil.copy(target.weights, tmp_path)
    shutil.copy(target.step_dir / INDEX, tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    warnings: list[str] = []
    assert "other" not in open_weights(tmp_path, warn=warnings.append).shapes
    assert "model.safetensors not read, because model.safetensors.index.json does not list it" in warnings[0]
    index = json.loads((tmp_path / INDEX).read_bytes())
    index["weight_map"]["nowhere"] = target.weights.name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"says that nowhere is in model-.*, but it is not there"):
        open_weights(tmp_path, warn=warnings.append)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match="is a pipe"):
            open_weights(path, warn=warnings.append)


def test_metrics_are_json_and_come_back_as_numbers(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": float("inf"), "c": [1.0, float("-inf")], "d": 1e300, "skipped": True}
    log = MetricsLog(tmp_path, resumed_step=0, warn=no_warning)
    log.write({"step": 1, **values})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (strict["a"], strict["b"], strict["c"]) == ("NaN", "Infinity", [1.0, "-Infinity"])
    (line,) = read_metrics(tmp_path, warn=no_warning)
    assert repr(line) == repr({"step": 1, **values})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/loss": NaN, "b": -Infinity}\n')  # release 0.1.0
    assert repr(read_metrics(tmp_path, warn=no_warning)) == "[{'step': 1, 'eval/loss': nan, 'b': -inf}]"


def test_a_damaged_line_of_metrics_is_said_and_the_others_stay(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 1}', '{"step": 2, "lo', '{"step": 3, "loss": null}', '{"step": 4, "loss": 4}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="is left out") as caught:
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4]
    assert len(caught) == 2
    warnings: list[str] = []
    MetricsLog(tmp_path, resumed_step=9, warn=warnings.append).close()
    assert [warning.partition(":")[0] for warning in warnings] == ["line 2 is left out", "line 3 is left out"]
    assert [line["step"] for line in read_metrics(tmp_path, warn=no_warning)] == [1, 4]


def test_an_optimizer_may_keep_an_infinity_in_its_groups(tmp_path: Path) -> None:
    class Capped(torch.optim.SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr, momentum=0.9)
            for group in self.param_groups:
                group["cap"] = float("inf")

        def step(self, closure: Any = None) -> Any:
            assert all(group["cap"] in (float("inf"), 2.0) for group in self.param_groups)
            for group in self.param_groups:
                group["cap"] = 2.0
            return super().step(closure)

    class OfCapped(NetRecipe):
        def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
            return Capped([parameter for _, parameter in parameters], lr=self.options.lr)

    fit(OfCapped, output_dir=tmp_path, **OPTIONS, stop_at_step=2)
    assert fit(OfCapped, output_dir=tmp_path, **OPTIONS).step == 4
    state = json.loads((tmp_path / CHECKPOINTS / step_dir_name(1) / TRAINER_STATE).read_bytes())
    assert as_meant(json.loads(to_json(float("inf")))) == float("inf")
    assert state["group_hyperparameters"][0]["cap"] == 2.0


def test_an_export_whose_files_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    class Careless(NetRecipe):
        def export(self, folder: Path, model: Any) -> None:
            (folder / ".hidden").write_text("x")

    with (
        pytest.warns(UserWarning, match=r"step 1 was not saved: .*'\.hidden': name it with letters"),
        pytest.raises(UserError, match="its last checkpoint could not be saved"),
    ):
        fit(Careless, output_dir=tmp_path, **{**OPTIONS, "max_steps": 1})


def test_names_are_printed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[31m\r\x9b2J\u202eb\nc\td\udce9"
    assert str(UserError(f"{evil}: x")) == "a\\x1b[31m\\r\\x9b2J\\u202eb\nc\td\\udce9: x"
    assert printable(evil, is_name=True).isprintable()
    assert some([evil]).isprintable()
    display = Display(silent=False)
    display.say(evil)
    display.warn(evil)
    display.summary({"name": evil})
    display.table("evaluation", {evil: 1.0})
    display.columns((evil, evil), [(evil, "1")])
    display.matrix(evil, [[1, 2], [3, 4]], classes=[evil, "other"], is_confusion=True)
    out = capsys.readouterr().out
    assert not {"\x1b", "\r", "\x9b", "\u202e", "\udce9"} & set(out)

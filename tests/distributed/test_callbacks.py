"""Hooks and callbacks: told the same on any ranks and after a resume; errors end a run that is saved."""

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardlaunch import Callback, Event, UserError, fit, main_only
from shardlaunch.launcher.option_fields import flag
from shardlaunch.launcher.reporting.tracking import read_metrics
from tests.distributed.ranks import run_on_ranks
from tests.recipes import LinearNet, losses, run_quietly

OPTIONS: dict[str, Any] = {
    **{"max_steps": 9, "eval_every": 3, "save_every": 3, "threads_per_rank": 1, "tracker": "none", "lr": 0.05},
    **{"num_train": 100, "save_on_best": False},
}


class Told(Callback):
    """Keeps what it is told, with what it draws."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def _note(self, hook: str, event: Event) -> None:
        drawn = [torch.rand(()).item(), float(np.random.rand()), random.random()]
        told = [event.step, event.num_steps, event.epoch, event.samples, event.is_finished, event.is_skipped]
        assert not torch.is_grad_enabled()
        self.lines.append([hook, told, dict(event.metrics), drawn])

    def on_start(self, event: Event) -> None:
        assert not event.model.training
        self._note("on_start", event)

    def after_update(self, event: Event) -> None:
        assert event.model.training
        self._note("after_update", event)

    def on_evaluation(self, event: Event) -> None:
        assert not event.model.training
        inputs = torch.ones(2, 12)
        event.log_table("outputs", ["a", "b", "c"], event.model(inputs).tolist())
        event.log_image("weights/first", torch.linspace(0, 1, 12).view(3, 4))
        self._note("on_evaluation", event)

    def on_save(self, event: Event) -> None:
        assert event.is_main
        assert event.checkpoint is not None
        assert (event.checkpoint / "manifest.json").exists()
        with open(event.run_dir / "saved.txt", "a") as file:
            file.write(f"{event.step} {sorted(event.metrics.items())}\n")

    def on_end(self, event: Event) -> None:
        self._note("on_end", event)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = list(state["lines"])


class WithHooks(LinearNet):
    """A recipe that has a hook of its own."""

    @main_only
    def on_end(self, event: Event) -> None:
        (event.run_dir / "end.txt").write_text(f"{event.step} {event.is_finished} {event.checkpoint} {os.getpid()}")


def _runs(folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    told = []
    for name, options in jobs:
        callback = Told()
        fit(WithHooks, output_dir=folder / name, callbacks=[callback], **{**OPTIONS, **options})
        told.append(callback.lines)
    return told


def test_hooks_are_told_the_same_on_any_ranks_and_after_a_resume(tmp_path: Path) -> None:
    jobs: list[tuple[str, dict[str, Any]]] = [("one", {}), ("resumed", {"stop_at_step": 4}), ("resumed", {})]
    one, stopped, resumed = _runs(tmp_path, jobs)
    two = run_on_ranks(2, _runs, tmp_path, [("two", {}), ("fsdp2", {"strategy": "fsdp2"})])
    steps = [[hook, told[0]] for hook, told, _, _ in one]
    expected: list[Any] = [["on_start", 0]]
    for step in range(1, 10):
        expected += [["after_update", step]] + [["on_evaluation", step]] * (step % 3 == 0)
    assert steps == [*expected, ["on_end", 9]]
    assert [told[3] for hook, told, _, _ in one if hook == "after_update"] == [32, 64, 96, 100, 132, 164, 196, 200, 232]
    assert one[1][2].keys() == {"loss", "lr", "grad_norm"}
    assert one[-1][2]["eval/loss"] == read_metrics(tmp_path / "one")[-1]["eval/loss"]

    def of_kind(lines: list[Any]) -> list[Any]:
        return [line for line in lines if line[0] in ("after_update", "on_evaluation")]

    assert of_kind(resumed) == of_kind(one), "to the bit, with what was drawn"
    assert [line[1][4] for line in resumed if line[0] == "on_end"] == [True]
    assert [line[1][4] for line in stopped if line[0] == "on_end"] == [False]
    for lines in (*two[0], *two[1]):
        assert [line[:2] + line[3:] for line in lines] == [line[:2] + line[3:] for line in one]
        for line, other in zip(one, lines, strict=True):
            assert other[2] == pytest.approx(line[2], rel=1e-5, abs=1e-6)
    for name in ("one", "resumed", "two", "fsdp2"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
        lines = (tmp_path / name / "saved.txt").read_text().splitlines()
        for line in lines:
            kept = [one for one in read_metrics(tmp_path / name) if "eval/loss" in one]
            step = int(line.split()[0])
            known = [one for one in kept if one["step"] <= step][-1]
            assert line == f"{step} {[(key, known[key]) for key in ('eval/accuracy', 'eval/loss')]}"
        assert [int(line.split()[0]) for line in lines] == ([3, 4, 6, 9] if name == "resumed" else [3, 6, 9])
        assert (tmp_path / name / "end.txt").read_text().startswith("9 True ")
        media = sorted(path.name for path in (tmp_path / name / "media" / "step-00000006").iterdir())
        assert media[0] == "outputs.csv"
        assert media[1].startswith("weights_first-")
        assert media[1].endswith(".png")


class FailsAtFour(Callback):
    """Fails on one rank."""

    hook = "after_update"
    rank = 0

    def after_update(self, event: Event) -> None:
        if event.step >= 4 and int(os.environ.get("RANK", "0")) == self.rank:
            raise ZeroDivisionError("by nothing")


class FailsElsewhere(FailsAtFour):
    rank = 1


class FailsAtTheStart(Callback):
    def on_start(self, event: Event) -> None:
        event.options.lr = 3.0
        raise SystemExit(event.step)


class FailsAtTheEvaluation(Callback):
    def on_evaluation(self, event: Event) -> None:
        event.log_table("t", ["a", "b"], [[1]])


class FailsAtASave(Callback):
    def on_save(self, event: Event) -> None:
        raise OSError(28, "No space left on device", "/there")


class FailsAtTheEnd(Callback):
    def on_end(self, event: Event) -> None:
        raise UserError("not so")


class ChangesTheModel(Callback):
    def after_update(self, event: Event) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            next(iter(event.model.parameters())).data.mul_(2)


FAILURES = {
    FailsAtFour: (r"callback FailsAtFour: after_update\(\) failed at step 4: ZeroDivisionError: by nothing \(.*", 5),
    FailsElsewhere: (r"callback FailsElsewhere: after_update\(\) failed at step 4: .* resumes from .*0005\. Fix it", 5),
    FailsAtTheStart: (r"callback FailsAtTheStart: on_start\(\) failed at step 0: SystemExit: 0 \(", 0),
    FailsAtTheEvaluation: (r"on_evaluation\(\) failed at step 3: log_table\('t', ...\): row 0 has 1 cells, and", 4),
    FailsAtASave: (r"callback FailsAtASave: on_save\(\) failed at step 3: .*No space left on device", None),
    FailsAtTheEnd: (r"callback FailsAtTheEnd: on_end\(\) failed at step 9: not so .*All is saved", 9),
    ChangesTheModel: (r"ChangesTheModel: after_update\(\) changes weight", 0),
}


ON_TWO_RANKS = (FailsElsewhere, FailsAtASave, ChangesTheModel)


def _failures(folder: Path, kinds: tuple[type[Callback], ...]) -> dict[str, Any]:
    steps = {}
    for kind in kinds:
        with pytest.raises(UserError, match=FAILURES[kind][0]):
            fit(LinearNet, output_dir=folder / kind.__name__, callbacks=[kind], **OPTIONS)
        folders = sorted((folder / kind.__name__ / "checkpoints").glob("step-*"))
        steps[kind.__name__] = int(folders[-1].name[5:]) if folders else 0
    return steps


def test_a_hook_that_fails_on_any_rank_ends_a_run_that_is_saved(tmp_path: Path) -> None:
    one_rank = tuple(kind for kind in FAILURES if kind not in ON_TWO_RANKS)
    two, other = run_on_ranks(2, _failures, tmp_path, ON_TWO_RANKS)
    assert two == other
    found = {**two, **_failures(tmp_path, one_rank)}
    for kind, (_, step) in FAILURES.items():
        assert step is None or found[kind.__name__] == step, kind
    assert 4 <= found["FailsAtASave"] <= 9
    assert fit(LinearNet, output_dir=tmp_path / "FailsAtFour", **OPTIONS).step == 9
    fit(LinearNet, output_dir=tmp_path / "plain", **OPTIONS)
    assert losses(tmp_path / "FailsAtFour") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    words = [word for name, value in OPTIONS.items() if value is not False for word in (flag(name), str(value))]
    here = "tests.distributed.test_callbacks"
    words += ["--callback", f"{here}:Counts", "--output-dir", str(tmp_path / "one"), f"--callback={here}:FailsAtFour"]
    status, output = run_quietly(LinearNet, [*words, "--no-save-on-best"])
    assert status == 2
    assert "Traceback" not in output
    assert "error: callback FailsAtFour: after_update() failed at step 4" in output
    state = json.loads((tmp_path / "one" / "checkpoints" / "step-00000005" / "trainer_state.json").read_text())
    assert state["callbacks"] == {"Counts": {"value": 5}}


class Counts(Callback):
    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def after_update(self, event: Event) -> None:
        self.value += 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_states_of_callbacks(tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "max_steps": 2, "output_dir": tmp_path / "run"}
    for value in ((1, 2), {3: "a"}, torch.ones(2), np.float64(1.0), "a" * (1 << 20)):
        with pytest.raises(UserError, match=r"callback Counts: state_dict\(\)"):
            fit(LinearNet, callbacks=[Counts(value)], **options)
    first, second = Counts(), Counts(float("inf"))
    fit(LinearNet, callbacks=[first, second], stop_at_step=1, **options)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "trainer_state.json").read_text())
    assert state["callbacks"] == {"Counts": {"value": 1}, "Counts#2": {"value": "Infinity"}}
    new = Told()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(LinearNet, callbacks=[again := Counts(), new], **options)
    assert again.value == 2
    texts = [str(one.message) for one in said]
    assert any("callback Told: the checkpoint has no state of it; it begins anew" in text for text in texts), texts
    assert any("the state of the callback Counts#2, which this start is not given" in text for text in texts), texts


class BadOnce(LinearNet):
    """Has no number for a loss in the fifth step."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        is_bad = self.moment.step == 4 and not self.moment.is_evaluation
        return super().loss(outputs, batch) * (float("nan") if is_bad else 1.0)


def test_a_callback_goes_back_with_the_run(tmp_path: Path) -> None:
    counts, told = Counts(), Told()
    with pytest.warns(UserWarning, match="going back to step 3"):
        fit(BadOnce, output_dir=tmp_path, callbacks=[counts, told], on_nonfinite="rollback", **OPTIONS)
    assert counts.value == 8, "without the step that is left out"
    steps = [told[0] for hook, told, _, _ in told.lines if hook == "after_update"]
    assert steps == [1, 2, 3, 4, 6, 7, 8, 9]


def test_callbacks_begin_each_fold_with_their_first_state(tmp_path: Path) -> None:
    counts, told = Counts(7), Told()
    fit(LinearNet, output_dir=tmp_path, folds=2, callbacks=[counts, told], **{**OPTIONS, "max_steps": 2})
    assert counts.value == 7 + 2
    assert [told[0] for hook, told, _, _ in told.lines if hook == "after_update"] == [1, 2]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("nowhere:Thing", "nowhere cannot be imported: ModuleNotFoundError"),
        ("json", "must be MODULE:CLASS"),
        ("no.py:Thing", "cannot be imported: .*No such file"),
        ("tests.distributed.test_callbacks:Thing", "has no class Thing; it has Told, FailsAtFour"),
        ("json:JSONEncoder", r"json.encoder.JSONEncoder is not derived from shardlaunch.Callback"),
        (object(), "is not derived from shardlaunch.Callback"),
    ],
)
def test_what_is_no_callback(given: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        fit(LinearNet, callbacks=[given], output_dir=tmp_path / "run", **OPTIONS)


class Misnamed(Callback):
    def on_train_end(self, trainer: Any) -> None: ...


class TwoArguments(Callback):
    def on_end(self, trainer: Any, model: Any) -> None: ...  # type: ignore[override]


class Needs(Callback):
    def __init__(self, path: str) -> None: ...


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Misnamed, r"Misnamed.on_train_end\(\) is never called; did you mean on_end\(\)\?"),
        (TwoArguments, r"TwoArguments.on_end\(\): must take one argument besides self, the event"),
        (Needs, r"Needs\(\) fails: TypeError: .*missing 1 required positional argument"),
    ],
)
def test_callbacks_that_cannot_be_called(kind: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        fit(LinearNet, callbacks=[kind], output_dir=tmp_path / "run", **OPTIONS)

"""The space of a sweep, checked before any trial; what its search proposes, and what a folder refuses."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from shardlaunch import Options, UserError, option
from shardlaunch.launcher.commands.sweep.process import Follower
from shardlaunch.launcher.commands.sweep.record import SweepRecord, check_folder, new_record, write_sweep
from shardlaunch.launcher.commands.sweep.search import Search
from shardlaunch.launcher.commands.sweep.space import Parameter, grid, read_space


@dataclass(kw_only=True)
class SpaceOptions(Options):
    """Options to search."""

    widths: tuple[int, ...] = option((8,), minimum=1)
    dropout: float = option(0.1, minimum=0, below=1)
    num_layers: int = option(2, minimum=1)
    deep: bool = False


SPACE = """
lr: {low: 1e-4, high: 1e-1, log: true}
num-layers: {low: 2, high: 8, step: 2}
widths: [[8, 4], 16]
deep: [true, False]
optimizer: [sgd, adamw]
dropout: {low: 0, high: 0.3, step: 0.1}
"""


def _read(tmp_path: Path, text: str, fixed: frozenset[str] = frozenset()) -> dict[str, Parameter]:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return read_space(path, SpaceOptions, fixed)


def test_a_space_is_read_by_the_types_of_the_options(tmp_path: Path) -> None:
    space = _read(tmp_path, SPACE)
    assert {name: one.described() for name, one in space.items()} == {
        "lr": "0.0001 to 0.1, log",
        "num_layers": "whole numbers 2 to 8 in steps of 2",
        "widths": "8 4 | 16",
        "deep": "true | false",
        "optimizer": "sgd | adamw",
        "dropout": "0.0 to 0.3 in steps of 0.1",
    }
    values = {"lr": 0.01, "num_layers": 4, "widths": "8 4", "deep": "false", "optimizer": "sgd", "dropout": 0.3}
    words = [space[name].words(value, SpaceOptions) for name, value in values.items()]
    assert words == [
        ["--lr=0.01"],
        ["--num-layers=4"],
        ["--widths", "8", "4"],
        ["--no-deep"],
        ["--optimizer=sgd"],
        ["--dropout=0.3"],
    ]


def test_a_grid_has_all_values(tmp_path: Path) -> None:
    space = _read(tmp_path, SPACE)
    assert grid({name: space[name] for name in ("num_layers", "dropout", "widths")}) == {
        "num_layers": [2, 4, 6, 8],
        "dropout": [0.0, 0.1, 0.2, 0.3],
        "widths": ["8 4", "16"],
    }
    with pytest.raises(UserError, match="--sampler grid: --lr: too many values"):
        grid(space)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no option"),
        ("lerning_rate: [1, 2]", "unknown option"),
        ("learning_rate: [1, 2]", "did you mean --lr"),
        ("lr: 0.1", "--lr 0.1: one value is no search"),
        ("lr: [0.1]", "needs at least two values"),
        ("lr: [0.1, 1e-1]", "1e-1 is there twice"),
        ("lr: [0.1, fast]", "--lr fast: must be a number"),
        ("dropout: [0.1, 1.5]", "--dropout 1.5: must be at least 0 and below 1"),
        ("dropout: {low: 0, high: 2}", "--dropout 2.0: must be at least 0 and below 1"),
        ("lr: {low: 0.1}", "a range needs high"),
        ("lr: {min: 0.1, high: 1}", "min is no key of a range; did you mean low?"),
        ("lr: {low: 1, high: 0.1}", "low 1 must be below high 0.1"),
        ("lr: {low: 0.1, high: .inf}", "--lr .inf: must be a number"),
        ("dropout: {low: 0, high: 0.1, log: true}", "must begin above 0"),
        ("lr: {low: 1e-3, high: 0.1, log: maybe}", "log maybe: must be true or false"),
        ("lr: {low: 1e-3, high: 0.1, log: true, step: 0.1}", "has no step"),
        ("num_layers: {low: 2, high: 7, step: 2}", "do not meet high 7; the largest value would be 6"),
        ("num_layers: {low: 2, high: 8, step: 0.5}", "step 0.5: must be a whole number above 0"),
        ("num_layers: {low: 2.5, high: 8}", "--num-layers 2.5: must be a whole number"),
        ("optimizer: {low: 1, high: 2}", "takes a list of values instead of a range"),
        ("deep: [true, maybe]", "--deep maybe: must be true or false"),
        ("schedule: [linear, rising]", "--schedule rising: must be one of"),
        ("output_dir: [a, b]", "it does not change what a trial finds"),
        ("strategy: [ddp, fsdp2]", "changes the speed of a trial, not its result"),
        ("seed: [0, 1]", "must be the same for all trials"),
        ("weight_decay: [0.0, 0.1]", "is also set after ` -- `"),
        ("lr: [0.1, 0.2]\nlr: [0.1, 0.3]", "is set in line 1 and in line 2"),
        ("[lr]", "must be a mapping"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        _read(tmp_path, text, frozenset({"weight_decay"}))
    assert message in str(raised.value)
    assert "space.yaml" in str(raised.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        _read(tmp_path, "lr: [0.1]\nnum_layers: [1, 2]\nfast: [1]\noutput_dir: [a, b]\n")
    lines = str(raised.value).splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["1)", "3)", "4)"]


def _search(folder: Path, space: dict[str, Parameter], **asked: object) -> Search:
    return Search(folder, space, **{"sampler": "tpe", "pruner": "median", "seed": 3, "is_min": True, **asked})  # type: ignore[arg-type]


def _step(search: Search) -> dict[str, object]:
    """Run a trial whose losses follow from its values."""
    trial = search.ask()
    loss = abs(trial.params["lr"] - 0.03) + 0.01 * trial.params["num_layers"]
    for number in range(1, 4):
        trial.report(loss + 1 / number, number)
        if trial.should_prune():
            search.pruned(trial)
            break
    else:
        search.completed(trial, loss)
    return dict(trial.params)


def test_a_search_that_is_taken_up_again_proposes_the_same_trials(tmp_path: Path) -> None:
    space = _read(tmp_path, SPACE)
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = _search(tmp_path / "straight", space)
    expected = [_step(straight) for _ in range(14)]
    found = []
    for number in range(14):
        if number in (0, 5, 12):
            search = _search(tmp_path / "stopped", space)
        found.append(_step(search))
    assert found == expected
    states = [trial.state.name for trial in straight.trials()]
    assert states == [trial.state.name for trial in search.trials()]
    assert {"COMPLETE", "PRUNED"} == {*states}
    assert sum(straight.importances().values()) == pytest.approx(1)


def test_a_trial_that_was_running_keeps_its_values(tmp_path: Path) -> None:
    space = _read(tmp_path, SPACE)
    trial = _search(tmp_path, space).ask()
    trial.report(1.5, 1)
    again = _search(tmp_path, space)
    (frozen,) = again.trials()
    attached = again.attach(frozen)
    assert (attached.number, attached.params) == (trial.number, trial.params)
    again.completed(attached, 1.0)
    assert [each.state.name for each in again.trials()] == ["COMPLETE"]


def _record(**changed: object) -> SweepRecord:
    fields = {
        "recipe": "net",
        "recipe_words": ["net.py", "--"],
        "objective": "eval/loss",
        "direction": "min",
        "space": {"lr": "0.1 | 0.2"},
        "fixed": {"epochs": 3, "dropout": 0.1},
        "sampler": "tpe",
        "pruner": "median",
        "seed": 0,
    }
    return new_record(**{**fields, **changed})


def test_another_sweep_in_the_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    assert not check_folder(folder, _record())
    write_sweep(folder, _record())
    assert check_folder(folder, _record(recipe_words=["net.py", "--ranks", "2", "--"]))
    with pytest.raises(UserError) as raised:
        check_folder(folder, _record(objective="eval/accuracy", space={"lr": "0.1 | 0.3"}, fixed={"epochs": 4}))
    message = str(raised.value)
    assert "--objective: 'eval/loss' -> 'eval/accuracy'" in message
    assert "lr in --space: '0.1 | 0.2' -> '0.1 | 0.3'" in message
    assert "--epochs: 3 -> 4" in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something else than a sweep"):
        check_folder(tmp_path / "other", _record())


def test_evaluations_are_read_as_they_come_and_from_a_file_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(tmp_path)
    assert list(follower.evaluations()) == []
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "epoch": 1.0, "eval/loss": 0.5}\n{"step": 4, "eval/lo')
    assert [(one.number, one.step) for one in follower.evaluations()] == [(1, 2)]
    with open(path, "ab") as file:
        file.write(b'ss": 0.25}\n')
    found = list(follower.evaluations())
    assert [(one.number, one.metrics["eval/loss"]) for one in found] == [(1, 0.5), (2, 0.25)]
    other = tmp_path / "other"
    other.write_bytes(b'{"step": 2, "epoch": 1.0, "eval/loss": 0.5}\n{"step": 6, "eval/loss": 0.125}\n')
    other.replace(path)  # as a resume does
    assert [one.step for one in follower.evaluations()] == [2, 4, 6]

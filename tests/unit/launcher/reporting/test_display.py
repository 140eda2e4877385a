"""What a person sees: phases, steps and metrics, on a terminal and in a file."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from shardlaunch import fit
from shardlaunch.data import derived
from shardlaunch.launcher.reporting import phases as phases_module
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.phases import Phases, duration_text, phase, shown_by
from shardlaunch.metrics import named_metrics
from tests.recipes import NUM_CLASSES, NetRecipe

ERASED = "\x1b[2K"  # what a terminal is told to erase a line


def _display(*, is_terminal: bool, width: int = 80) -> tuple[Display, io.StringIO]:
    display, shown = Display(silent=False), io.StringIO()
    display.console = Console(
        file=shown, force_terminal=is_terminal, width=width, highlight=False, soft_wrap=True, color_system=None
    )
    display.phases = Phases(display.console)
    return display, shown


def _text(shown: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())


def _left(shown: io.StringIO) -> str:
    """Return what stays on a terminal below what was last erased."""
    return _text(io.StringIO(shown.getvalue().rpartition(ERASED)[2])).strip()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_end_of_training_leaves_one_line(is_terminal: bool) -> None:
    display, shown = _display(is_terminal=is_terminal)
    with display.progress(done=0, total=2) as view:
        for step in (1, 2):
            view.step(step, loss=0.5, lr=0.1, tokens=0, samples=8, step_s=0.25)
        view.evaluating(30, 30)
        with display.phases.phase("saving"):
            pass
    last = _left(shown).splitlines()
    assert re.fullmatch(r"trained 2 steps in \d+\.\d s; 32 samples/s without evaluations and saves", last[-1])
    assert len(last) == (1 if is_terminal else 4)
    assert (ERASED in shown.getvalue()) == is_terminal
    if is_terminal:
        assert "saving" in _text(shown)
    else:
        assert _text(shown).splitlines()[:2] == [
            "first step ...",
            "step 1/2  loss 0.5000  lr 1.00e-01  32 samples/s  0:00:00 left",
        ]


def test_time_left_is_shown_for_steps_alone() -> None:
    display, shown = _display(is_terminal=True)
    with display.progress(done=0, total=9) as view:
        view.step(1, loss=0.5, lr=0.1, tokens=640, samples=8, step_s=0.25)
        assert view._bar is not None
        view._bar.refresh()
        at_step = _text(shown)
        view.evaluating(1000, 2000)
        view._bar.refresh()
    assert at_step.rstrip().endswith("loss 0.5000  lr 1.00e-01  2,560 tokens/s -:--:-- left")
    assert "evaluating 1,000/2,000 samples" in _text(shown)
    assert "left" not in _text(shown).partition("evaluating")[2]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_phases(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(phases_module.time, "monotonic", lambda: clock[0])
    display, shown = _display(is_terminal=is_terminal)
    with display.phases.phase("reading data"):
        clock[0] += 2.5
        with display.phases.phase("tokenizing", num_rows=3000) as advance:
            for _ in range(3):
                clock[0] += 25.0
                advance(1000)
        clock[0] += 0.5
    with display.phases.phase("building the model"):
        clock[0] += 0.5
    lines = [line.rstrip() for line in _text(shown).splitlines()]
    times = [line for line in lines if ": " in line and not line.endswith("...")]
    assert times == ["tokenizing: 3,000 rows in 0:01:15", "reading data: 3.0 s"], "each without the one inside it"
    if is_terminal:
        assert shown.getvalue().count(ERASED) >= 2
        assert _left(shown) == "", "the live line is gone"
    else:
        assert lines == [
            "reading data ...",
            "tokenizing: 3,000 rows ...",
            *(f"tokenizing: {done},000/3,000 rows ..." for done in (1, 2, 3)),
            *times,
            "building the model ...",
        ]


def test_a_failed_phase_is_closed() -> None:
    display, shown = _display(is_terminal=True)
    with pytest.raises(OSError, match="gone"), display.phases.phase("reading data"), display.phases.phase("tokenizing"):
        raise OSError("gone")
    with display.phases.phase("reading data"):
        pass
    assert _left(shown) == ""


def test_what_is_cached_is_not_shown() -> None:
    display, shown = _display(is_terminal=False)
    texts = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(2500)]})

    def lengths(texts: list[str]) -> dict[str, Any]:
        return {"length": [len(text) for text in texts]}

    def of_batch(batch: Any) -> dict[str, Any]:
        return lengths(batch["text"])

    def mapped(function: Callable[..., dict[str, Any]], key: str, **options: Any) -> list[int]:
        result: list[int] = derived(texts, function, key=(key,), doing="measuring", **options)["length"][:]
        return result

    expected = [len(text) for text in texts["text"]]
    assert mapped(lengths, "outside of a run", input_columns=["text"]) == expected
    assert shown.getvalue() == ""
    with shown_by(display.phases):
        assert mapped(lengths, "columns", input_columns=["text"]) == expected
        assert mapped(of_batch, "batches") == expected
    assert _text(shown).splitlines() == ["measuring: 2,500 rows ..."] * 2
    with phase("outside of a run") as advance:
        advance(1)
    assert len(_text(shown).splitlines()) == 2


CLASSES = ["airplane", "automobile", "bird"]
MATRIX = [[900, 11, 22], [37, 1948, 59], [74, 85, 996]]


@pytest.mark.parametrize(
    ("classes", "width", "heads", "row"),
    [
        (CLASSES, 80, ["airplane", "automobile", "bird"], "automobile"),
        (CLASSES, 50, ["airplane", "automob…", "bird"], "automobile"),
        (CLASSES, 44, ["0", "1", "2"], "1 automobile"),
        (
            ["a long name that ends in 1", "a long name that ends in 2", "b"],
            80,
            ["0", "1", "2"],
            "1 a long name that e",
        ),
        ((), 80, ["0", "1", "2"], "1"),
        (["one", "too", "many", "names"], 80, ["0", "1", "2"], "1"),
    ],
    ids=["names", "names cut", "too wide for names", "names alike where cut", "no names", "names of something else"],
)
def test_confusion_matrix(classes: list[str], width: int, heads: list[str], row: str) -> None:
    display, shown = _display(is_terminal=True, width=width)
    display.matrix("confusion_matrix", MATRIX, classes=classes, is_confusion=True)
    lines = _text(shown).splitlines()
    assert lines[0] == "confusion_matrix (rows: true classes, columns: predicted classes)"
    table = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines if "┃" in line or "│" in line]
    assert table[0] == ["true \\ predicted", *heads]
    assert table[2][0].startswith(row)
    assert [cells[1:] for cells in table[1:]] == [[f"{count:,}" for count in counts] for counts in MATRIX]
    assert max(map(len, lines[1:])) <= width


def test_other_lists_of_numbers() -> None:
    display, shown = _display(is_terminal=False)
    display.matrix("f1", [0.5, float("nan")], classes=["[bad]", "good"], is_confusion=False)
    display.matrix("gram", [[1.5, 2.0, 3.0]], classes=["x"], is_confusion=False)
    display.matrix("cube", [[[1]]], is_confusion=False)
    display.matrix("none", [], is_confusion=False)
    display.matrix("many", [[0] * 21] * 21, is_confusion=True)
    lines = [re.sub("[┃│]", " ", line).split() for line in _text(shown).splitlines() if not re.search("[┏┡└]", line)]
    assert lines[:3] == [["class", "f1"], ["[bad]", "0.5000"], ["good", "undefined"]]
    assert lines[3:6] == [["gram"], ["0", "1", "2"], ["0", "1.5000", "2.0000", "3.0000"]]
    assert [" ".join(words) for words in lines[6:]] == [
        "cube: 1 x 1 x 1 numbers, in metrics.jsonl",
        "none: 0 numbers, in metrics.jsonl",
        "many: 21 x 21 numbers, in metrics.jsonl",
    ]


def test_durations() -> None:
    assert [duration_text(seconds) for seconds in (0.04, 59.94, 59.96, 3725)] == [
        "0.0 s",
        "59.9 s",
        "0:01:00",
        "1:02:05",
    ]


class NamedNet(NetRecipe):
    """A recipe whose classes have names, and a confusion matrix among its metrics."""

    class_names = ("low", "middle", "high")

    def metrics(self) -> dict[str, Any]:
        return named_metrics("accuracy", "confusion_matrix", num_classes=NUM_CLASSES)


def test_a_run_from_its_first_line_to_its_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = fit(NamedNet, show=True, max_steps=2, threads_per_rank=1, output_dir=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if not re.match(r"[a-z ]+: [\d.:]+( s)?$", line)]
    assert [line for line in lines if line.endswith("...")] == [
        "loading libraries ...",
        "reading data ...",
        "looking for a checkpoint ...",
        "building the model ...",
        "placing the model ...",
        "checking the evaluation on one batch ...",
        "checking the loss on one micro-batch ...",
        "first step ...",
    ]
    assert lines[0] == "loading libraries ..."
    trained = next(number for number, line in enumerate(lines) if line.startswith("trained 2 steps"))
    assert lines[trained + 1] == "evaluation at step 2"
    assert "┃ true \\ predicted ┃ low ┃ middle ┃ high ┃" in lines
    matrix = result.evaluations[-1]["confusion_matrix"]
    assert f"│ high             │ {matrix[2][0]:>3} │ {matrix[2][1]:>6} │ {matrix[2][2]:>4} │" in lines
    assert lines[-1].startswith("last   ")
    fit(NamedNet, show=True, max_steps=2, threads_per_rank=1, output_dir=tmp_path)
    assert "loading the checkpoint ..." in capsys.readouterr().out.splitlines()

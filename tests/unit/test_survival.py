"""How benchmarks/peers_survival.py judges what a run did before and after a fault."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
judging: Any = importlib.import_module("survival.judging")
sys.path.pop()

WHOLE = [(0, 1), (2, 3), (4, 5), (0, 4), (1, 5), (2, 3)]


def test_steps_are_put_together_from_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "ids-0-0").write_text("[3]\n[0]\n[5]\n")
    (tmp_path / "ids-0-1").write_text("[2]\n[1]\n[")  # killed while it wrote
    (tmp_path / "ids-1-0").write_text("[9]\n")
    assert judging.steps_of(tmp_path, 0) == [(2, 3), (0, 1), (5,)]
    assert judging.steps_of(tmp_path, 1) == [(9,)]
    assert judging.steps_of(tmp_path, 2) == []


def test_only_updates_count_as_steps(tmp_path: Path) -> None:
    (tmp_path / "updates-0-0").write_text("\n\n")
    (tmp_path / "updates-0-1").write_text("\n\n\n")  # the other rank was killed before it wrote
    assert judging.num_updates(tmp_path, 0) == 3
    assert judging.num_updates(tmp_path, 1) == 0


@pytest.mark.parametrize(
    ("num_first", "begin", "lost"),
    [
        pytest.param(4, 4, 0, id="goes on"),
        pytest.param(4, 3, 0, id="the step in flight again"),
        pytest.param(4, 2, 2, id="from a checkpoint"),
        pytest.param(4, 0, 4, id="from the beginning"),
        pytest.param(0, 0, 0, id="before the first step"),
        pytest.param(6, 6, 0, id="was done"),
    ],
)
def test_the_same_data_however_far_it_goes_back(num_first: int, begin: int, lost: int) -> None:
    first, second = WHOLE[:num_first], WHOLE[begin:]
    assert judging.same_data(WHOLE, first, second)
    assert judging.num_lost(WHOLE, first, second) == lost


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(WHOLE[:2], WHOLE[3:], id="skips a step"),
        pytest.param(WHOLE[:4], [WHOLE[5], WHOLE[4]], id="another order"),
        pytest.param(WHOLE[:4], WHOLE[:2], id="the order of another epoch"),
        pytest.param(WHOLE[:4], [WHOLE[3], *WHOLE[3:]], id="a step twice"),
        pytest.param([WHOLE[1], WHOLE[0], WHOLE[2]], WHOLE[3:], id="other data before the fault"),
        pytest.param(WHOLE[:4], [*WHOLE, *WHOLE], id="too many steps"),
    ],
)
def test_other_data(first: list[Any], second: list[Any]) -> None:
    assert not judging.same_data(WHOLE, first, second)


def _row(**changed: Any) -> dict[str, Any]:
    first = {"status": 75, "seconds": 1.0, "orphans": 0, "is_finished": False, **changed.pop("first", {})}
    row = {"tool": "ours", "cell": "SIGTERM step, one rank", "fault": "SIGTERM", "first": first, "is_finished": True}
    return row | {"lost": 0, "is_same_data": True, "is_same_weights": True} | changed


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (_row(), "as without"),
        (_row(first={"is_finished": True, "status": 0}), "ignored"),
        (_row(first={"orphans": 1}), "leaves processes"),
        (_row(first={"seconds": 30.5, "orphans": 2}, is_finished=False), "hangs, does not resume"),
        (_row(lost=5, is_same_weights=False), "5 steps lost, other weights"),
        (_row(is_same_data=False, is_same_weights=False), "other data"),
        (_row(first={"status": 0}), "status 0"),
        (_row(fault="newest checkpoint:", first={"status": -9}), "as without"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_verdict_in_words(row: dict[str, Any], verdict: str) -> None:
    assert judging.verdict(row) == verdict


def test_the_tables_count_per_tool_what_a_measure_is_about() -> None:
    good, hung = _row(), _row(tool="other", first={"seconds": 31.0}, lost=2)
    killed = _row(fault="SIGKILL", cell="SIGKILL step, one rank", first={"status": 1})
    titles, *rows = judging.count_table({"cells": [good, hung, killed]})
    assert titles == ("faults survived", "ours", "other")
    counts = {words: cells for words, *cells in rows}
    assert counts["signals: ends within 30 s, no process left"] == ["1 of 1", "0 of 1"]
    assert counts["signals: no step lost but the one in flight"] == ["1 of 1", "0 of 1"]
    assert counts["a rank killed: the others end within 30 s"] == ["1 of 1", "0 of 0"]
    assert counts["the same command finishes the run"] == ["2 of 2", "1 of 1"]
    assert judging.fault_table({"cells": [good, hung, killed]})[1:] == [
        ("SIGTERM step, one rank", "as without", "hangs, 2 steps lost"),
        ("SIGKILL step, one rank", "as without", ""),
    ]

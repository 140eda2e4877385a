"""`shardlaunch doctor` in this process: its report, exit status and JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardlaunch.launcher.commands.doctor import accelerate_file, versions
from shardlaunch.launcher.commands.main import main

Doctor = Callable[..., tuple[int, str, str]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Doctor:
    """Return `shardlaunch doctor` as a function of its words, in a folder of its own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(versions, "check_versions", lambda: [])  # looks through all that is installed
    monkeypatch.setattr(accelerate_file, "check_default_file", lambda path, num_gpus: [])

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shardlaunch", "doctor", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return run


def test_a_report_of_a_recipe(doctor: Doctor, tmp_path: Path) -> None:
    status, out, err = doctor("mnist_mlp", "--no-measure", "--", "--preset", "demo", "--output-dir", "out")
    assert (status, err) == (0, ""), out
    assert out.endswith("\nno problem found\n")
    for heading in ("\nthis launch\n", "\ndevices\n", "\nnetwork\n", "\ndisk\n"):
        assert heading in out
    assert "strategy ddp (auto) on 2 ranks" in out
    assert "out does not exist yet: a new run" in out
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_status_1_and_one_json_document(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLAUNCH_STRATEGIE", "fsdp2")
    monkeypatch.setenv("RANK", "1")
    status, out, err = doctor("--no-measure", "--json")
    assert (status, json.loads(out)["num_problems"]) == (1, 2)  # the rank too is of no launch
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    status, out, err = doctor("--no-measure", "--json")
    assert (status, out, err) == (0, "", "")  # of several ranks, the first one says it
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("RANK", "0")
    status, out, err = doctor("--no-measure", "--json")
    report = json.loads(out)
    assert (status, err, report["num_problems"]) == (1, "", 1)
    (problem,) = [one for section in report["sections"] for one in section["findings"] if one["level"] == "problem"]
    assert problem["advice"] == "did you mean SHARDLAUNCH_STRATEGY?"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ranks", "-1"), "--ranks -1: must be at least 1"),
        (("--strategy", "zero9"), "unknown strategy 'zero9'"),
        (("no_such_recipe",), "no such recipe"),
        (("--", "--lr", "1"), "words after ` -- ` are options of a recipe"),
        (("mnist_mlp", "--no-measure", "--", "--lrr", "1"), "--lrr"),
        (
            ("mnist_mlp", "--no-measure", "--strategy", "zero2", "--", "--strategy", "fsdp2"),
            "two strategies were requested",
        ),
    ],
)
def test_what_cannot_be_carried_out(words: tuple[str, ...], says: str, doctor: Doctor) -> None:
    status, _, err = doctor(*words)
    assert status == 2
    assert err.startswith("error: ")
    assert says in err

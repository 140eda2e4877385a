"""Runs of a few small checkpoints, and the command `shardlaunch ckpt` in this process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardlaunch.launcher.commands.main import main
from tests.unit.checkpoints.saved import save_step

RUN_RECORD = {
    "identity": {"lr": 0.1},
    "warn": {},
    "options": {},
    "ranks": 1,
    "strategy": "single",
    "versions": {"torch": "2.13.0"},
    "machine": {},
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Ckpt = Callable[..., Ended]


@pytest.fixture
def ckpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ckpt:
    """Return `shardlaunch ckpt` as a function of its words."""

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["shardlaunch", "ckpt", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Ended(caught.value.code, captured.out, captured.err)

    return run


def make_run(run_dir: Path, steps: tuple[int, ...] = (2, 4, 6), *, best: int = 4, **of_step: Any) -> Path:
    """Write a run with checkpoints and an evaluation at each of them."""
    for step in steps:
        position = {"best_value": 0.75, "best_step": best, "best_metric": "accuracy"} if step >= best else {}
        save_step(run_dir / "checkpoints", step, position=position, **of_step)
    (run_dir / "run.json").write_text(json.dumps(RUN_RECORD))
    lines = [{"step": step, "loss": 1 / step} for step in range(1, steps[-1] + 1)]
    lines += [{"step": step, "eval/loss": 2 / step, "eval/accuracy": step / 8} for step in steps]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run_dir

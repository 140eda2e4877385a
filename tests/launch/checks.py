"""Checks of output and files of runs for the tests of command lines, a run to damage, and data files."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import checkpoint_steps, open_checkpoint
from tests.launch.command import STUCK_S, TRACEBACK, Ended

STEPS = ("--max-steps", "3", "--save-every", "1", "--keep", "0", "--tracker", "none", "--threads-per-rank", "1")
DEMO = ("--preset", "demo", *STEPS)


def write_table(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write columns as CSV, Parquet or JSON lines."""
    if path.suffix == ".csv":
        pd.DataFrame(columns).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(columns).to_parquet(path)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


def flip_byte(run_dir: Path, step: int) -> None:
    """Damage the weights of a checkpoint, in the middle of a tensor."""
    path = run_dir / "checkpoints" / f"step-{step:08}" / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_message(ended: Ended, says: Sequence[str]) -> None:
    """Check that a command was refused with one message that has the expected texts."""
    assert ended.status > 0, ended.both
    assert TRACEBACK not in ended.err, ended.both
    lines = ended.err.strip().splitlines()
    assert lines, f"no message\n{ended.both}"
    is_line = len(lines) == 1 and lines[0].startswith("error: ")
    is_frame = lines[0].startswith("╭") and lines[-1].startswith("╰") and ended.err.count("╭") == 1
    assert is_line or is_frame, f"more than one message\n{ended.both}"
    for text in says:
        assert text in ended.message, f"not said: {text}\n{ended.both}"


def assert_valid(run_dir: Path, steps: Sequence[int]) -> None:
    """Check that a run has just these checkpoints and that they are valid."""
    checkpoints_dir = run_dir / "checkpoints"
    assert checkpoint_steps(checkpoints_dir) == list(steps)
    for step in steps:
        assert open_checkpoint(checkpoints_dir / f"step-{step:08}", peers=Peers()).step == step
    assert not list(checkpoints_dir.glob(".*")), "left behind"


def last_evaluation(output_dir: Path) -> dict[str, Any]:
    """Return the last line of a run's metrics with an accuracy."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/accuracy" in line][-1]


def logged_steps(run_dir: Path) -> int:
    """Return how many lines the metrics of a run have."""
    log = run_dir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_step(step: int, run_dir: Path, is_running: Callable[[], bool]) -> None:
    """Wait until the metrics of a run that goes on have reached a step."""
    end = time.monotonic() + STUCK_S
    while logged_steps(run_dir) < step:
        assert is_running(), "it ended before"
        assert time.monotonic() < end
        time.sleep(0.001)

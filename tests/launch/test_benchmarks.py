"""The benchmarks run, on a fraction of their work: their figures are not looked at."""

from pathlib import Path

import pytest

from tests.launch.command import PYTHON, RECIPES, end_of, environment

BENCHMARKS = RECIPES.parent / "benchmarks"


@pytest.mark.parametrize(
    "words",
    [
        ("step_overhead.py", "--rounds", "1", "--steps", "5"),
        ("checkpoint_io.py", "--rounds", "1", "--gigabytes", "0.01", "--written-by"),
        ("plan_scale.py", "--largest", "1000000"),
        ("attention.py", "--rounds", "1", "--lengths", "192", "--tokens", "192"),
        ("head_loss.py", "--rounds", "1", "--sizes", "1"),
    ],
    ids=lambda words: words[0],
)
def test_benchmark(words: tuple[str, ...], tmp_path: Path) -> None:
    folder = ("--dir", str(tmp_path)) if words[0] == "checkpoint_io.py" else ()
    ended = end_of((*PYTHON, str(BENCHMARKS / words[0]), *words[1:], *folder), environment(tmp_path))
    assert ended.status == 0, ended.both
    firsts = ("ours", "now", "length 192", "tokens 2048")
    assert any(line.startswith(firsts) for line in ended.out.splitlines()), ended.both

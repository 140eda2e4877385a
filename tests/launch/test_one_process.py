"""One script for a laptop and a cluster: each way to set a strategy works with one process."""

from pathlib import Path

import pytest

from tests.launch.command import ACCELERATE, PLAIN, PYTHON, RECIPES, end_of, environment, forked_end_of

CONFIGS = RECIPES.parent / "accelerate_configs"


def configured(name: str) -> tuple[str, ...]:
    """Return the words of an accelerate launch by one of our files, with one process."""
    return (*ACCELERATE, "--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "1")


@pytest.mark.parametrize(
    ("command", "options", "variables", "strategy"),
    [
        (PYTHON, ("--strategy", "fsdp2"), {}, "fsdp2"),
        (PYTHON, (), {"SHARDLAUNCH_STRATEGY": "zero2"}, "zero2"),
        (configured("fsdp2"), (), {}, "fsdp2"),
        (configured("zero3_offload"), (), {}, "zero3"),
    ],
    ids=["option", "variable", "accelerate fsdp2", "accelerate zero3"],
)
def test_one_process(
    command: tuple[str, ...], options: tuple[str, ...], variables: dict[str, str], strategy: str, tmp_path: Path
) -> None:
    words = [*command, PLAIN, *options, "--output-dir", str(tmp_path / "out")]
    run = forked_end_of if command == PYTHON else end_of
    ended = run(words, environment(tmp_path, variables))
    assert ended.status == 0, ended.both
    (line,) = [line for line in ended.out.splitlines() if line.startswith("strategy")]
    assert line.split(maxsplit=1)[1].startswith(f"{strategy}: one rank: nothing is sharded"), ended.both

"""A run that is asked to stop breaks off an evaluation, and a step that it has no time to finish, and loses neither."""

import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.errors import EXIT_STOPPED
from tests.launch.checks import assert_valid
from tests.launch.command import PYTHON, STUCK_S, Ended, environment, forked, forked_end_of
from tests.recipes import final_tensors, training_lines

NUM_STEPS = 6
# An evaluation that takes long where SLOW names it, or all steps do; says so by a file.
RECIPE = """
import os
import time
from dataclasses import dataclass
from pathlib import Path
import torch
from torchmetrics.classification import MulticlassAccuracy
from shardlaunch import Options, Recipe, TensorData, launch, option

@dataclass(kw_only=True)
class SlowOptions(Options):
    global_batch_size: int = 16
    micro_batch_size: int = 1
    max_steps: int = 6
    eval_every: int = option(3, mark="free")
    lr: float = 0.1
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Slow(Recipe):
    options: SlowOptions
    best_metric = "accuracy"

    def datasets(self):
        inputs = torch.rand(128, 4, generator=torch.Generator().manual_seed(0))
        data = TensorData(inputs=inputs, labels=(inputs.sum(1) > 2).long())
        return {"train": data, "eval": data}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))

    def loss(self, outputs, batch):
        kind, _, step = os.environ.get("SLOW", "none").partition(" ")
        if kind == ("eval" if self.moment.is_evaluation else "steps"):
            if step == str(self.moment.step):
                Path(os.environ["MARK"]).touch()
            time.sleep(0.2 if kind == "steps" or step == str(self.moment.step) else 0)
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(2, average="micro")}

launch(Slow)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "slow.py"
    # A mean over one sample has no variance: batch norm takes each twice.
    path.write_text(RECIPE.replace("micro_batch_size: int = 1", "micro_batch_size: int = 2"))
    return str(path)


@pytest.fixture(scope="module")
def whole_of(
    recipe: str, hf_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[list[str], Path]]:
    """Return the command of a strategy, and the folder of a run of it that was not stopped."""

    @cache
    def whole(strategy: str, num_ranks: int) -> tuple[list[str], Path]:
        words = [*PYTHON, recipe, "--strategy", strategy]
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        ended = forked_end_of([*words, "--output-dir", str(run_dir)], environment(hf_home), num_ranks=num_ranks)
        assert ended.status == 0, ended.both
        return words, run_dir

    return whole


def stopped(words: list[str], hf_home: Path, run_dir: Path, slow: str, *, num_ranks: int) -> Ended:
    """Run until it is slow, and send a signal to the last rank."""
    mark = run_dir.with_name("mark")
    env = environment(hf_home, {"SLOW": slow, "MARK": str(mark)})
    with forked([*words, "--output-dir", str(run_dir)], env, num_ranks=num_ranks) as run:
        end = time.monotonic() + STUCK_S
        while not mark.exists():
            assert time.monotonic() < end
            assert run.ranks[0].is_alive(), run.end().both
            time.sleep(0.005)
        pid = run.ranks[-1].pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        ended = run.end()
    assert ended.status == EXIT_STOPPED, ended.both
    assert "Traceback" not in ended.both, ended.both
    return ended


@pytest.mark.parametrize(
    ("slow", "strategy", "num_ranks"),
    [
        ("eval 3", "single", 1),
        (f"eval {NUM_STEPS}", "single", 1),
        (f"eval {NUM_STEPS}", "fsdp2", 2),
        ("steps 1", "single", 1),
        ("steps 1", "ddp", 2),
        ("steps 1", "fsdp2", 2),
        ("steps 1", "zero2", 2),
        ("steps 1", "zero3", 2),
    ],
)
def test_goes_on_as_if_it_had_not_stopped(
    slow: str,
    strategy: str,
    num_ranks: int,
    whole_of: Callable[[str, int], tuple[list[str], Path]],
    hf_home: Path,
    tmp_path: Path,
) -> None:
    words, expected = whole_of(strategy, num_ranks)
    run_dir = tmp_path / "run"
    # A step that cannot be finished within the time of grace is broken off.
    options = ["--grace-s", "0"] if slow.startswith("steps") else []
    ended = stopped([*words, *options], hf_home, run_dir, slow, num_ranks=num_ranks)
    step = int(slow.split()[1])
    assert f"stopped after step {step}, which is saved" in ended.out
    position = open_checkpoint(run_dir / "checkpoints" / f"step-{step:08}", peers=Peers()).position
    assert position.is_evaluation_due == slow.startswith("eval")

    again = forked_end_of([*words, "--output-dir", str(run_dir)], environment(hf_home), num_ranks=num_ranks)
    assert again.status == 0, again.both
    assert training_lines(run_dir) == training_lines(expected)
    tensors, expected_tensors = final_tensors(run_dir), final_tensors(expected)
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensors[key], expected_tensors[key]) for key in tensors)
    position = open_checkpoint(run_dir / "checkpoints" / f"step-{NUM_STEPS:08}", peers=Peers()).position
    assert position == open_checkpoint(expected / "checkpoints" / f"step-{NUM_STEPS:08}", peers=Peers()).position
    complete = forked_end_of([*words, "--output-dir", str(run_dir)], environment(hf_home), num_ranks=num_ranks)
    assert "this run is complete" in complete.out


def test_the_end_of_a_time(recipe: str, hf_home: Path, tmp_path: Path) -> None:
    """--max-time has no room for this step, and none for its evaluation."""
    run_dir = tmp_path / "run"
    env = environment(hf_home, {"SLOW": "eval 3", "MARK": str(tmp_path / "mark")})
    words = [*PYTHON, recipe, "--strategy", "ddp", "--max-time", "6s", "--output-dir", str(run_dir)]
    ended = forked_end_of(words, env, num_ranks=2)
    assert ended.status == EXIT_STOPPED, ended.both
    assert "--max-time: stopped after step 3, which is saved" in ended.out
    assert_valid(run_dir, [3])

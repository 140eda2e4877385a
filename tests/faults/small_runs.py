"""Small runs for the campaigns: a new one and a resume, what they must end with, and what must not be left."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import checkpoint_steps, newest_valid
from tests.faults.calls import run_ranks
from tests.recipes import final_tensors, training_lines

_WORDS = ("--max-steps", "6", "--eval-every", "3", "--threads-per-rank", "1", "--tracker", "tensorboard")
_SAVES = ("--save-every", "2", "--keep", "1")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run of six steps on some ranks, from the beginning or from what `template` holds."""

    name: str
    num_ranks: int = 1
    template: Path | None = None
    has_second_place: bool = False
    """It saves to a folder inside the run's too, whose calls count."""

    def prepare(self, run_dir: Path) -> None:
        """Put the folder of the run into the state in which it starts."""
        shutil.rmtree(run_dir, ignore_errors=True)
        if self.template is not None:
            shutil.copytree(self.template, run_dir)

    def words(self, run_dir: Path) -> list[str]:
        """Return the words of its command line."""
        second = ("--save-to", str(run_dir / "second")) if self.has_second_place else ()
        return [*_WORDS, *_SAVES, *second, "--output-dir", str(run_dir)]

    def leftovers(self, run_dir: Path) -> list[Path]:
        """Return what a run must not leave: files that are staged, or to be deleted, and superfluous checkpoints."""
        hidden = [path for path in run_dir.rglob("*") if path.name.startswith((".staging", ".trash", ".shared"))]
        staged = [path for path in run_dir.rglob("*") if path.name.endswith(".staged")]
        return hidden + staged


class Reference:
    """What a scenario ends with where nothing fails."""

    def __init__(self, scenario: Scenario, run_dir: Path) -> None:
        scenario.prepare(run_dir)
        trial = run_ranks(scenario.words(run_dir), run_dir, num_ranks=scenario.num_ranks)
        assert not any(trial.statuses), trial.output
        self.tensors = final_tensors(run_dir)
        self.lines = training_lines(run_dir)
        self.steps = checkpoint_steps(run_dir / CHECKPOINTS)
        self.second_steps = checkpoint_steps(run_dir / "second" / CHECKPOINTS)
        assert not scenario.leftovers(run_dir)

    def differences(self, run_dir: Path) -> list[str]:
        """Return in what a finished run differs."""
        checkpoint = newest_valid(run_dir / CHECKPOINTS, peers=Peers(), warn=lambda text: None)
        if checkpoint is None or not checkpoint.position.is_finished:
            return ["not finished"]
        found = []
        tensors = final_tensors(run_dir)
        if tensors.keys() != self.tensors.keys() or not all(
            torch.equal(tensors[name], self.tensors[name]) for name in tensors
        ):
            found.append("other weights")
        if training_lines(run_dir) != self.lines:
            found.append("other lines")
        if checkpoint_steps(run_dir / CHECKPOINTS) != self.steps:
            found.append("other checkpoints")
        second = run_dir / "second" / CHECKPOINTS
        if self.second_steps and newest_step(second) != self.second_steps[-1]:
            found.append("other copies")
        return found


def newest_step(checkpoints_dir: Path) -> int:
    """Return the step of the newest checkpoint in a folder, -1 for none."""
    checkpoint = newest_valid(checkpoints_dir, peers=Peers(), warn=lambda text: None)
    return checkpoint.step if checkpoint is not None else -1


def scenarios(folder: Path, only: str = "") -> list[Scenario]:
    """Return the runs whose names match `only`; what they resume from is written below `folder`."""
    found = []
    for num_ranks in (1, 2):
        if re.search(only, f"new run on {num_ranks}"):
            found.append(Scenario(name=f"new run on {num_ranks}", num_ranks=num_ranks))
        if re.search(only, f"resume on {num_ranks}"):
            template = folder / f"template-{num_ranks}"
            words = [*_WORDS, "--save-every", "1", "--keep", "0", "--stop-at-step", "4", "--output-dir", str(template)]
            trial = run_ranks(words, template, num_ranks=num_ranks)
            assert not any(trial.statuses), trial.output
            for name in (".staging-step-00000005", ".trash-step-00000001"):
                shutil.copytree(template / CHECKPOINTS / "step-00000004", template / CHECKPOINTS / name)
            found.append(Scenario(name=f"resume on {num_ranks}", num_ranks=num_ranks, template=template))
    if re.search(only, "second place"):
        found.append(Scenario(name="second place", has_second_place=True))
    return found

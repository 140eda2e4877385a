"""Small runs for the campaigns: a new one and a resume, what they must end with, and what must not be left."""

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import checkpoint_steps, newest_valid
from shardlaunch.launcher.commands.main import main
from tests.faults.calls import NO_FAULT, Fault, Trial, run_ranks
from tests.recipes import final_tensors, training_lines

_WORDS = ("--max-steps", "6", "--eval-every", "3", "--threads-per-rank", "1", "--tracker", "tensorboard")
_SAVES = ("--save-every", "2", "--keep", "1")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run of six steps on some ranks, from the beginning or from what `template` holds."""

    name: str
    num_ranks: int = 1
    template: Path | None = None
    options: tuple[str, ...] = ()
    """More options; `{run_dir}` stands for the folder of the run, so that calls below it count."""

    def prepare(self, run_dir: Path) -> None:
        """Put the folder of the run into the state in which it starts."""
        shutil.rmtree(run_dir, ignore_errors=True)
        if self.template is not None:
            shutil.copytree(self.template, run_dir)

    def run(self, run_dir: Path, *, armed_rank: int = 0, fault: Fault = NO_FAULT, records_data: bool = False) -> Trial:
        """Run to the end, or as far as the fault lets it."""
        return run_ranks(
            self._words(run_dir),
            run_dir,
            num_ranks=self.num_ranks,
            armed_rank=armed_rank,
            fault=fault,
            records_data=records_data,
        )

    def _words(self, run_dir: Path) -> list[str]:
        more = [word.format(run_dir=run_dir) for word in self.options]
        return [*_WORDS, *_SAVES, *more, "--output-dir", str(run_dir)]

    def result(self, run_dir: Path) -> dict[str, Any]:
        """Return what a finished run has come to, by the name of what differs from the reference if it does."""
        checkpoint = newest_valid(run_dir / CHECKPOINTS, peers=Peers(), warn=lambda text: None)
        if checkpoint is None or not checkpoint.position.is_finished:
            return {"an end": False}
        return {
            "an end": True,
            "weights": {name: tensor.numpy().tobytes() for name, tensor in final_tensors(run_dir).items()},
            "lines": training_lines(run_dir),
            "checkpoints": checkpoint_steps(run_dir / CHECKPOINTS),
            "copies": newest_step(run_dir / "second" / CHECKPOINTS),
        }

    def said(self, output: str) -> list[str]:
        """Return the messages of which a run that ends with an error has one."""
        return re.findall(r"^error: .*", output, re.M)

    def leftovers(self, run_dir: Path) -> list[Path]:
        """Return what must not be left: files that are staged, or to be deleted, and copies of what a disk has."""
        hidden = [path for path in run_dir.rglob("*") if path.name.startswith((".staging", ".trash", ".shared"))]
        staged = [path for path in run_dir.rglob("*") if path.name.endswith(".staged")]
        return hidden + staged


@dataclass(frozen=True, kw_only=True)
class Command(Scenario):
    """`shardlaunch ckpt` on the run that `template` holds, in the folder `run` below."""

    target: str
    """The folder below in which it writes."""

    def prepare(self, run_dir: Path) -> None:
        """Put a copy of the run there."""
        shutil.rmtree(run_dir, ignore_errors=True)
        assert self.template is not None
        shutil.copytree(self.template, run_dir / "run")

    def run(self, run_dir: Path, *, armed_rank: int = 0, fault: Fault = NO_FAULT, records_data: bool = False) -> Trial:
        """Run the command to its end, or as far as the fault lets it."""

        def work() -> None:
            sys.argv = ["shardlaunch", "ckpt", *(word.format(run_dir=run_dir) for word in self.options)]
            main()

        return run_ranks([], run_dir, fault=fault, records_data=records_data, work=work)

    def result(self, run_dir: Path) -> dict[str, Any]:
        """Return the files that are left, with what is in them."""
        files = (path for path in sorted(run_dir.rglob("*")) if path.is_file() and path.name != ".lock")
        return {"files": {str(path.relative_to(run_dir)): path.read_bytes() for path in files}}

    def said(self, output: str) -> list[str]:
        """Return the error, or the first checkpoint that is damaged or not copied, which others need not stop."""
        return super().said(output) or re.findall(r"^(?:warning:|  damaged, stays:) .*", output, re.M)[:1]

    def leftovers(self, run_dir: Path) -> list[Path]:
        """Return what must not be left where the command writes."""
        return super().leftovers(run_dir / self.target)


class Reference:
    """What a scenario ends with where nothing fails."""

    def __init__(self, scenario: Scenario, run_dir: Path) -> None:
        scenario.prepare(run_dir)
        trial = scenario.run(run_dir)
        assert not any(trial.statuses), trial.output
        self._scenario = scenario
        self._result = scenario.result(run_dir)
        assert self._result.get("an end", True)
        assert not scenario.leftovers(run_dir)

    def differences(self, run_dir: Path) -> list[str]:
        """Return in what a finished run differs."""
        found = self._scenario.result(run_dir)
        if not found.get("an end", True):
            return ["not finished"]
        return [f"other {name}" for name, value in self._result.items() if found[name] != value]


def newest_step(checkpoints_dir: Path) -> int:
    """Return the step of the newest checkpoint in a folder, -1 for none."""
    checkpoint = newest_valid(checkpoints_dir, peers=Peers(), warn=lambda text: None)
    return checkpoint.step if checkpoint is not None else -1


def scenarios(folder: Path, only: str = "") -> list[Scenario]:
    """Return the runs whose names match `only`; what they resume from is written below `folder`."""
    found: list[Scenario] = []
    for num_ranks in (1, 2):
        found.append(Scenario(name=f"new run on {num_ranks}", num_ranks=num_ranks))
        template = folder / f"template-{num_ranks}"
        found.append(Scenario(name=f"resume on {num_ranks}", num_ranks=num_ranks, template=template))
    found.append(Scenario(name="second place", options=("--save-to", "{run_dir}/second")))
    found.append(Scenario(name="saves that the training waits for", num_ranks=2, options=("--async-save", "off")))
    found.append(Scenario(name="copies in memory", num_ranks=2, options=("--replicate-every", "1")))
    template = folder / "template-1"
    found.append(
        Command(name="prune", template=template, target="run", options=("prune", "{run_dir}/run", "--keep", "2"))
    )
    found.append(
        Command(name="copy", template=template, target="copy", options=("copy", "{run_dir}/run", "{run_dir}/copy"))
    )
    found = [scenario for scenario in found if re.search(only, scenario.name)]
    for template, num_ranks in {one.template: one.num_ranks for one in found if one.template is not None}.items():
        _write_template(template, num_ranks)
    return found


def _write_template(template: Path, num_ranks: int) -> None:
    """Write what a run leaves that was interrupted in a save and in a deletion."""
    words = [*_WORDS, "--save-every", "1", "--keep", "0", "--stop-at-step", "4", "--output-dir", str(template)]
    trial = run_ranks(words, template, num_ranks=num_ranks)
    assert not any(trial.statuses), trial.output
    for name in (".staging-step-00000005", ".trash-step-00000001"):
        shutil.copytree(template / CHECKPOINTS / "step-00000004", template / CHECKPOINTS / name)

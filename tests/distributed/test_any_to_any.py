"""One run under every strategy: the same losses, checkpoints of the same bits, a resume of any under any other."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlaunch.checkpoints.listing import listed_digests, read_listing
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.launcher.command_line.parsing import parse_options
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.tracking import recorded_digests
from shardlaunch.launcher.runs.run import Run
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, Settings
from shardlaunch.sharding.world import connect, disconnect
from tests.conftest import TABLE
from tests.distributed.ranks import run_on_ranks
from tests.recipes import MaskedBert, MaskedOptions, final_tensors, losses, training_lines

NUM_STEPS, SAVED = 24, 12
LOSS_BOUND = 1e-6
ARGV = ["--max-steps", str(NUM_STEPS), "--save-every", str(SAVED), "--keep", "0", "--threads-per-rank", "1"]
ARGV += ["--digest-every", str(SAVED), "--ema", "0.9"]  # digests are compared at each resume


@dataclass(frozen=True)
class Topology:
    """A strategy on a number of ranks."""

    strategy: str
    num_ranks: int
    settings: Settings = DEFAULT_SETTINGS

    def __str__(self) -> str:
        return self.strategy if self.strategy == "single" else f"{self.strategy}-x{self.num_ranks}"


SINGLE = Topology("single", 1)
HSDP = Topology("hsdp", 4, Settings(shard_ranks=2))
TOPOLOGIES = [
    SINGLE,
    *(Topology("ddp", n) for n in (2, 4)),
    *(Topology("fsdp2", n) for n in (2, 3, 4)),
    HSDP,
    *(Topology(f"zero{stage}", n) for stage, n in ((1, 2), (2, 2), (2, 4), (3, 2), (3, 3))),
]
FOR_PARITY_ONLY = [Topology("zero1", 4), Topology("zero3", 4)]


def trained_on(target: Topology) -> list[Topology]:
    """Return the sources that train on under a target: itself and two of other strategies, which vary by target.

    With these distances in the list every topology is the source of three targets, and each is of another strategy.
    """
    position = TOPOLOGIES.index(target)
    return [TOPOLOGIES[(position + distance) % len(TOPOLOGIES)] for distance in (0, 5, 8)]


class RunThatSavesFirst(Run):
    """A run that saves the state which it has just read, before it goes on."""

    def prepare(self) -> None:
        super().prepare()
        if self.position.step:
            self.saver.save(self.position, self.assembly)
        self.saver.wait()


def _run_all(topology: Topology, sources: dict[str, tuple[str, ...]], folder: Path) -> None:
    """Run once for each source, with its further words. All ranks."""
    world = connect(read_environment())
    for name, words in sources.items():
        argv = [*ARGV, "--output-dir", str(folder / name), *words]
        options = parse_options(MaskedOptions, {}, argv, program="test", description="")
        torch.set_num_threads(1)
        run = RunThatSavesFirst(MaskedBert(options), options, world, topology.strategy, "fp32", topology.settings)
        run.display = Display(silent=True)
        run.run()
    disconnect(world)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives the folder of the uninterrupted run under a topology."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def whole_run(topology: Topology) -> Path:
        run_on_ranks(topology.num_ranks, _run_all, topology, {str(topology): ()}, folder)
        return folder / str(topology)

    return whole_run


def _largest_difference(one: Path, other: Path, *, after: int = 0) -> float:
    expected, found = losses(one), losses(other)
    steps = range(after + 1, NUM_STEPS + 1)
    assert set(expected) == set(steps) | set(range(1, NUM_STEPS + 1))
    assert set(steps) <= set(found)
    return max(abs(expected[step] - found[step]) for step in steps)


def _tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(run / "checkpoints" / f"step-{step:08d}", peers=Peers())
    return {spec.key: checkpoint.read(spec, 0, spec.num_elements) for spec in checkpoint.specs()}


def _have_same_bits(one: Path, other: Path, step: int) -> bool:
    tensors, others = _tensors(one, step), _tensors(other, step)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)


def _position(run: Path, step: int) -> Position:
    return open_checkpoint(run / "checkpoints" / f"step-{step:08d}", peers=Peers()).position


def test_sources_are_of_other_strategies() -> None:
    for target in TOPOLOGIES:
        itself, *others = trained_on(target)
        assert itself == target
        assert len({target.strategy, *(source.strategy for source in others)}) == 3
    sources = [source for target in TOPOLOGIES for source in trained_on(target)]
    assert {sources.count(topology) for topology in TOPOLOGIES} == {3}


@pytest.mark.parametrize("topology", TOPOLOGIES[1:] + FOR_PARITY_ONLY, ids=str)
def test_every_strategy_runs_the_same_run(topology: Topology, whole_runs: Any) -> None:
    run = whole_runs(topology)
    assert _largest_difference(whole_runs(SINGLE), run) <= LOSS_BOUND
    for step, recorded in recorded_digests(run).items():
        digests = listed_digests(read_listing(run / "checkpoints" / f"step-{step:08d}"))
        assert recorded == {"loss": losses(run)[step], **digests}
    assert list(recorded_digests(run)) == [SAVED, NUM_STEPS]


@pytest.mark.parametrize("target", TOPOLOGIES, ids=str)
def test_any_checkpoint_resumes_here(target: Topology, whole_runs: Any, tmp_path: Path, record_property: Any) -> None:
    """All sources are read and saved again bit for bit, some train on, under one target, in one process group."""
    words = {}
    for source in TOPOLOGIES:
        resume = ("--resume", str(whole_runs(source) / "checkpoints" / f"step-{SAVED:08d}"))
        words[str(source)] = resume if source in trained_on(target) else (*resume, "--stop-at-step", str(SAVED))
    run_on_ranks(target.num_ranks, _run_all, target, words, tmp_path)
    differences = {}
    for source in TOPOLOGIES:
        resumed = tmp_path / str(source)
        assert _have_same_bits(whole_runs(source), resumed, SAVED), f"{source}: other bits than what was read"
        assert _position(whole_runs(source), SAVED) == _position(resumed, SAVED), source
        if source in trained_on(target):
            differences[str(source)] = _largest_difference(whole_runs(SINGLE), resumed, after=SAVED)
    shown = {str(source): "=" for source in TOPOLOGIES} | {name: f"{each:.0e}" for name, each in differences.items()}
    record_property(TABLE, (str(target), shown))
    assert max(differences.values()) <= LOSS_BOUND
    assert training_lines(tmp_path / str(target)) == training_lines(whole_runs(target))[SAVED:]
    assert _have_same_bits(whole_runs(target), tmp_path / str(target), NUM_STEPS)


def test_what_a_strategy_leaves_is_a_model_folder(whole_runs: Any) -> None:
    from transformers import AutoModelForMaskedLM

    for topology in TOPOLOGIES:
        step_dir = whole_runs(topology) / "checkpoints" / f"step-{NUM_STEPS:08d}"
        model, info = AutoModelForMaskedLM.from_pretrained(step_dir, output_loading_info=True)
        assert not info["missing_keys"]
        assert set(info["unexpected_keys"]) == {"never"}
        tensors = _tensors(whole_runs(topology), NUM_STEPS)
        assert all(torch.equal(p.reshape(-1), tensors[name]) for name, p in model.named_parameters())
        found = final_tensors(whole_runs(topology))  # by safetensors alone, each once
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key].reshape(-1), tensors[key]) for key in tensors)

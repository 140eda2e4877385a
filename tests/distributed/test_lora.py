"""LoRA by options: it starts as the base model, is the same run on any ranks, and checkpoints hold no base model."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardlaunch.checkpoints.manifest import read_manifest
from shardlaunch.launcher.planning.simulation import simulate
from shardlaunch.launcher.runs.data import load_data
from shardlaunch.launcher.training.batches import Slot
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS
from shardlaunch.sharding.world import World
from tests.distributed.ranks import run_on_ranks
from tests.lora_recipe import Tokens, TokensOptions, save_base
from tests.recipes import bits, losses, run_well

pytest.importorskip("peft")
VARIANTS = {"lora": (), "dora": ("--dora",), "exact": ("--exact",), "average": ("--swa-from", "2")}


def _run(argvs: Sequence[Sequence[str]]) -> None:
    for argv in argvs:
        run_well(Tokens, list(argv))


def _argv(folder: Path, name: str, *words: str) -> list[str]:
    return ["--model", str(folder / "base"), "--output-dir", str(folder / name), "--lora-rank", "2", *words]


def _resumed(folder: Path, name: str, resumed: str, *words: str) -> list[str]:
    """Return the command of a run in a folder of its own, resumed after two steps of another one."""
    return _argv(folder, resumed, "--resume", str(folder / name / "checkpoints" / "step-00000002"), *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model and runs on one rank, one of them of the whole model."""
    folder = tmp_path_factory.mktemp("lora")
    save_base(folder / "base")
    full = ["--model", str(folder / "base"), "--output-dir", str(folder / "full")]
    variants = [_argv(folder, name, *words) for name, words in VARIANTS.items()]
    again = _resumed(folder, "lora", "lora-again")
    run_on_ranks(1, _run, [full, *variants, _argv(folder, "dropout", "--lora-dropout", "0.5"), again])
    return folder


def test_adapters_begin_as_the_base_model(runs: Path) -> None:
    first = losses(runs / "full")[1]
    found = {name: losses(runs / name) for name in (*VARIANTS, "dropout")}
    assert [losses_[1] for losses_ in found.values()] == [first, first, pytest.approx(first, abs=1e-6), first, first]
    assert len({str(losses_) for losses_ in found.values()}) == len(found) - 1, "an average changes nothing"


def test_runs_without_adapters_are_known_by_the_same_as_before(runs: Path) -> None:
    options = {name: json.loads((runs / name / "run.json").read_text())["identity"] for name in ("full", "lora")}
    assert [name for name in options["lora"] if name not in options["full"]] == [
        *("--lora-rank", "--lora-alpha", "--lora-targets", "--lora-dropout", "--rslora", "--dora")
    ]


def _planned_bytes(folder: Path) -> int:
    recipe = Tokens(TokensOptions(model=str(folder / "base"), lora_rank=2))
    data = load_data(recipe, World(), None)
    batches = data.training_batches(recipe, World())
    micro_batch = batches.load(Slot(0, 0, 0, 1, data.plan.micro_batch(0, 0)))
    settings = {"settings": DEFAULT_SETTINGS, "precision_name": "fp32"}
    trace = simulate(recipe, data, micro_batch, strategy_name="fsdp2", ranks=2, ranks_per_node=2, **settings)
    return trace.state_bytes


def test_a_plan_knows_what_a_checkpoint_holds(runs: Path) -> None:
    tensors = read_manifest(runs / "lora/checkpoints/step-00000003").tensors
    assert run_on_ranks(1, _planned_bytes, runs) == [sum(spec.num_bytes for spec in tensors)]


def test_a_resume_is_of_the_same_bits(runs: Path) -> None:
    lines, position, tensors = bits(runs / "lora")
    assert bits(runs / "lora-again") == ([line for line in lines if line["step"] > 2], position, tensors)


def test_adapters_are_the_same_run_on_any_ranks(runs: Path) -> None:
    """And a resume goes on as the run would have, on other ranks and under other strategies."""
    plans = {
        2: {"lora": ("ddp", "fsdp2", "zero1", "zero3"), "dora": ("fsdp2",), "exact": ("fsdp2",), "average": ("fsdp2",)},
        3: {"lora": ("fsdp2",)},
    }
    sources = {2: {"fsdp2": "lora", "zero3": "lora-fsdp2-2"}, 3: {"ddp": "lora-zero3-2"}}
    for num_ranks, variants in plans.items():
        argvs = [
            _argv(runs, f"{variant}-{name}-{num_ranks}", "--strategy", name, *VARIANTS[variant])
            for variant, names in variants.items()
            for name in names
        ]
        argvs += [
            _resumed(runs, source, f"resumed-{name}-{num_ranks}", "--strategy", name)
            for name, source in sources[num_ranks].items()
        ]
        run_on_ranks(num_ranks, _run, argvs)
        for argv in argvs:
            run = Path(argv[3])
            found, expected = losses(run), losses(runs / next((name for name in VARIANTS if name in run.name), "lora"))
            bound = 0 if "exact" in run.name else 1e-6
            assert found == pytest.approx({step: expected[step] for step in found}, abs=bound), run.name
    for name, tensor in _averages(runs / "average").items():
        torch.testing.assert_close(_averages(runs / "average-fsdp2-2")[name], tensor, rtol=1e-5, atol=1e-6)


def _averages(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoints/step-00000003").glob("ema-*.safetensors")
    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors

"""The examples of docs/examples.md: the same on any ranks and in shards, exact after a resume; checkpoints load."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_model

from shardlaunch import fit
from shardlaunch.launcher.recipe import options_type_of
from tests.distributed.ranks import run_on_ranks
from tests.recipes import EXAMPLES, bits, example, training_lines

COMMON = {"tracker": "none", "log_every": 1, "threads_per_rank": 1, "eval_every": 100}
SMALL = {"max_steps": 3, "global_batch_size": 28, "micro_batch_size": 4}
"""Seven micro-batches, which neither 2 nor 3 ranks divide evenly."""
NAMES = (
    *("augmentation", "diffusion", "lora", "lstm", "multi_task", "ner", "objects", "odd_parametrisations"),
    *("sparse_embeddings", "vit"),
)
OTHERS = {"ddp": 2, "fsdp2": 2, "three": 3}
Runs = list[tuple[str, Path, dict[str, Any]]]


def _run(runs: Runs) -> None:
    """Run several examples, one after another. All ranks."""
    for name, folder, options in runs:
        fit(example(name), **{**COMMON, **SMALL, **options, "output_dir": folder})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every example on one rank, stopped and resumed, on two ranks, in two shards, and on three ranks."""
    root = tmp_path_factory.mktemp("runs")
    own: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    own["lora"] = {"rank": 2, "init_from": str(root / "base")}
    by_ranks: dict[int, Runs] = {1: [("lora", root / "base", {"max_steps": 1})], 2: [], 3: []}
    for name in NAMES:
        by_ranks[1] += [(name, root / f"{name}-one", own[name])]
        by_ranks[1] += [(name, root / f"{name}-resumed", {**own[name], **stop}) for stop in ({"stop_at_step": 2}, {})]
        for other, ranks in OTHERS.items():
            shards: dict[str, Any] = {"strategy": "fsdp2", **({"sparse": False} if "sparse" in name else {})}
            by_ranks[ranks] += [(name, root / f"{name}-{other}", own[name] | (shards if other == "fsdp2" else {}))]
    for ranks in (1, 2):
        by_ranks[ranks] += [("sparse_embeddings", root / f"exact-{ranks}", {"exact": True, "max_steps": 2})]
    for ranks, each in by_ranks.items():
        run_on_ranks(ranks, _run, each)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_the_same_run_on_any_ranks(name: str, runs: Path) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80
    lines = training_lines(runs / f"{name}-one")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert len({line["loss"] for line in lines if "loss" in line}) == 3
    for other in OTHERS:
        for mine, theirs in zip(lines, training_lines(runs / f"{name}-{other}"), strict=True):
            numbers = {key: value for key, value in mine.items() if isinstance(value, float) and key != "grad_norm"}
            assert {key: theirs[key] for key in numbers} == pytest.approx(numbers, rel=1e-6, abs=1e-6), other


@pytest.mark.parametrize("name", NAMES)
def test_resumes_of_examples_are_exact_and_their_checkpoints_load(name: str, runs: Path) -> None:
    assert bits(runs / f"{name}-resumed") == bits(runs / f"{name}-one")
    recipe_type = example(name)
    lora = {"rank": 2, "init_from": str(runs / "base")} if name == "lora" else {}
    recipe = recipe_type(options_type_of(recipe_type)(**lora))
    recipe.datasets()
    (weights,) = max((runs / f"{name}-one" / "checkpoints").iterdir()).glob("model*.safetensors")
    load_model(recipe.model(), weights)


def test_sparse_gradients_are_summed_exactly(runs: Path) -> None:
    assert bits(runs / "exact-1")[2] == bits(runs / "exact-2")[2]

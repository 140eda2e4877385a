"""Data read block by block, mixed or streamed: the same on any ranks, exact after a resume and a kill; refusals."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from shardlaunch import Recipe, TensorData, fit
from shardlaunch.data import Mixture
from tests.distributed.ranks import run_on_ranks
from tests.recipes import (
    NUM_CLASSES,
    NUM_FEATURES,
    NetRecipe,
    final_tensors,
    losses,
    recipe_class,
    run_quietly,
    save_small_bert,
)
from tests.shard_files import write_parquet

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "stream_parquet.py"
OPTIONS: dict[str, Any] = {
    **{"max_steps": 9, "eval_every": 100, "threads_per_rank": 1, "tracker": "none", "lr": 0.01},
    **{"global_batch_size": 16, "micro_batch_size": 4, "save_every": 2},
}


def _points(first: int, count: int) -> list[dict[str, Any]]:
    kinds = np.arange(first, first + count) % 3
    noise = np.random.default_rng(first).random((count, 4), dtype=np.float32)
    return [{"point": point + kind, "kind": int(kind)} for point, kind in zip(noise, kinds, strict=True)]


def _write(folder: Path) -> None:
    folder.mkdir()
    for number, count in enumerate((37, 20, 41)):  # 98 samples, 7 steps per epoch
        write_parquet(folder / f"train-{number}.parquet", _points(100 * number, count))
    write_parquet(folder / "eval-0.parquet", _points(1000, 30))


def _recipe() -> type[Recipe]:
    """Return the recipe of the documentation."""
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[EXAMPLE.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe_type: type[Recipe] = module.StreamParquet
    return recipe_type


class Mixed(NetRecipe):
    """Points of three sources, of which one comes again and again; the weights change at a step."""

    def datasets(self) -> Mapping[str, Any]:
        sources = [(_tensors(count, seed), weight) for seed, (count, weight) in enumerate(((90, 5), (12, 3), (40, 2)))]
        return {"train": Mixture(sources), "eval": Mixture([(data, 1) for data, _ in sources])}

    def lengths(self, dataset: Any) -> np.ndarray | None:
        return None


def _tensors(count: int, seed: int) -> TensorData:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return TensorData(inputs=torch.rand(count, NUM_FEATURES, generator=generator) + labels[:, None], labels=labels)


def test_text_recipes_mix_sources(tmp_path: Path) -> None:
    for name, words in (("a", "one two three four five"), ("b", "uno dos tres cuatro cinco")):
        (tmp_path / f"{name}.txt").write_text(f"{words}\n" * 200)
        rows = [f"{words.split()[n % 5]} {n},{name}{n % 2}" for n in range(60)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    common = ["--max-steps", "2", "--global-batch-size", "10", "--micro-batch-size", "5", "--tracker", "none"]
    data = f"{tmp_path}/a.{{0}}:0.7 {tmp_path}/b.{{0}}:0.3"
    small = ["--layers", "1", "--heads", "1", "--width", "16", "--context-length", "16", "--vocab-size", "300"]
    argv = [*common, *small, "--data", data.format("txt"), "--output-dir", str(tmp_path / "gpt")]
    status, output = run_quietly(recipe_class("gpt_lm"), argv)
    assert status == 0, output
    assert "order mixed" in " ".join(output.split())
    assert "a.txt 0.7 (" in " ".join(output.split())
    save_small_bert(tmp_path / "model")
    argv = [*common, "--data", data.format("csv"), "--model", str(tmp_path / "model"), "--lr", "1e-3"]
    status, output = run_quietly(recipe_class("bert_imdb"), [*argv, "--output-dir", str(tmp_path / "bert")])
    assert status == 0, output
    assert "a0" in output, "classes of both sources"
    assert "b1" in output


class Stream(IterableDataset[dict[str, Any]]):
    """Points with noise from the global generators, which workers of torch would share among them."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for number in range(worker.id if worker else 0, 50, worker.num_workers if worker else 1):
            yield {"inputs": torch.rand(NUM_FEATURES) + number % 3, "labels": number % 3}


class Streamed(Mixed):
    """Data that can only be read in order, which comes to its end and begins anew."""

    def datasets(self) -> Mapping[str, Any]:
        return {"train": Stream(), "eval": _tensors(20, 1)}

    def collate(self, samples: Any, seeds: Any) -> Any:
        return super().collate(default_collate(samples) if isinstance(samples, list) else samples, seeds)


KINDS: dict[str, dict[str, Any]] = {
    "blocks": {"shuffle_window": 40},
    "mixed": {"data_weights": ("4:1,1,0", "6:0.2,0.2,0.6")},
    "streamed": {},
}


def _runs(folder: Path, jobs: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Run jobs of (kind, name, options)."""
    recipes = {"blocks": _recipe(), "mixed": Mixed, "streamed": Streamed}
    for kind, name, options in jobs:
        given = {**OPTIONS, **KINDS[kind], "data": str(folder / "data"), **options}
        fit(recipes[kind], output_dir=folder / f"{kind}-{name}", **given)


def _killed(folder: Path, name: str) -> None:
    def after_update(self: Any, event: Any) -> None:
        if event.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = type("Killed", (_recipe(),), {"after_update": after_update, "__module__": EXAMPLE.stem})
    given = {**OPTIONS, **KINDS["blocks"], "data": str(folder / "data")}
    fit(killed, output_dir=folder / name, async_save="off", **given)


def test_runs_are_the_same_on_any_ranks_and_after_a_resume_and_a_kill(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    alone = [
        job
        for kind in KINDS
        for job in (
            (kind, "one", {}),
            (kind, "resumed", {"stop_at_step": 3}),
            (kind, "resumed", {"num_workers": 2}),
        )
    ]
    run_on_ranks(1, _runs, tmp_path, alone)
    with pytest.raises(AssertionError, match="ended without an answer"):
        run_on_ranks(2, _killed, tmp_path, "blocks-killed")
    two = [("blocks", "2", {"strategy": "fsdp2"}), ("mixed", "2", {}), ("streamed", "2", {"num_workers": 1})]
    run_on_ranks(2, _runs, tmp_path, two)
    run_on_ranks(3, _runs, tmp_path, [("blocks", "killed", {}), ("mixed", "3", {"strategy": "fsdp2"})])
    for kind in KINDS:
        expected = losses(tmp_path / f"{kind}-one")
        assert len(expected) == 9, "into the second epoch"
        assert losses(tmp_path / f"{kind}-resumed") == expected
        tensors = final_tensors(tmp_path / f"{kind}-resumed")
        of_one = final_tensors(tmp_path / f"{kind}-one")
        assert all(torch.equal(tensors[name], tensor) for name, tensor in of_one.items())
        for folder in tmp_path.glob(f"{kind}-*"):
            assert losses(folder) == pytest.approx(expected, abs=1e-6), folder.name


def test_other_data_or_another_window_is_another_run(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    recipe_type = _recipe()
    argv = [
        *("--data", str(tmp_path / "data"), "--output-dir", str(tmp_path / "out"), "--max-steps", "4"),
        *("--global-batch-size", "16", "--micro-batch-size", "4", "--tracker", "none"),
    ]
    status, output = run_quietly(recipe_type, [*argv, "--shuffle-window", "40", "--stop-at-step", "2"])
    assert status == 0, output
    assert "blockwise" in output
    assert "train: 98 samples in 11 blocks of 3 parquet files" in " ".join(output.split())
    assert "shuffled in windows of about 40 samples" in " ".join(output.split())
    status, output = run_quietly(recipe_type, [*argv, "--shuffle-window", "41"])
    assert status == 2
    assert "order of the batches" in output
    status, output = run_quietly(recipe_type, [*argv, "--shuffle-window", "5", "--output-dir", str(tmp_path / "5")])
    assert "so that those of a block stay together" in " ".join(output.split())
    write_parquet(tmp_path / "data" / "train-1.parquet", _points(101, 20))
    status, output = run_quietly(recipe_type, [*argv, "--shuffle-window", "40"])
    assert status == 2
    assert "fingerprint of the train data" in output

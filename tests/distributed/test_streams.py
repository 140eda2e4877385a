"""Data that is read block by block: the same losses on any ranks, exact after a resume and a kill, changes refused."""

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardlaunch import Recipe, fit
from tests.distributed.ranks import run_on_ranks
from tests.recipes import final_tensors, losses, run_quietly
from tests.shard_files import write_parquet

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "stream_parquet.py"
OPTIONS: dict[str, Any] = {
    **{"max_steps": 9, "eval_every": 100, "threads_per_rank": 1, "tracker": "none", "lr": 0.05, "shuffle_window": 40},
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


def _runs(folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> None:
    recipe_type = _recipe()
    for name, options in jobs:
        fit(recipe_type, data=str(folder / "data"), output_dir=folder / name, **{**OPTIONS, **options})


def _killed(folder: Path, name: str) -> None:
    def after_update(self: Any, event: Any) -> None:
        if event.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = type("Killed", (_recipe(),), {"after_update": after_update, "__module__": EXAMPLE.stem})
    fit(killed, data=str(folder / "data"), output_dir=folder / name, async_save="off", **OPTIONS)


def test_blocks_are_the_same_on_any_ranks_and_after_a_resume_and_a_kill(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    resumed = [("resumed", {"stop_at_step": 3}), ("resumed", {"stop_at_step": 8, "num_workers": 2}), ("resumed", {})]
    run_on_ranks(1, _runs, tmp_path, [("one", {}), *resumed])
    run_on_ranks(2, _runs, tmp_path, [("2", {"num_workers": 2}), ("fsdp2", {"strategy": "fsdp2"})])
    with pytest.raises(AssertionError, match="ended without an answer"):
        run_on_ranks(2, _killed, tmp_path, "killed")
    run_on_ranks(3, _runs, tmp_path, [("3", {}), ("killed", {})])
    expected = losses(tmp_path / "one")
    assert len(expected) == 9, "into the second epoch"
    assert losses(tmp_path / "resumed") == expected
    tensors = final_tensors(tmp_path / "resumed")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in final_tensors(tmp_path / "one").items())
    for name in ("2", "fsdp2", "3", "killed"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-6), name


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

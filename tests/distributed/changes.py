"""One run through changes of strategy and ranks: a step under each, which reads the checkpoint of the last."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open

from shardlaunch import fit
from shardlaunch.launcher.runs.run import Run
from tests.distributed.ranks import run_on_ranks
from tests.distributed.tokens import BOUND, Tokens
from tests.recipes import losses

# Ranks, and options: (data ranks) x (ranks that divide layers) for tensor parallelism.
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"strategy": "single"}),
    "ddp-x2": (2, {"strategy": "ddp"}),
    "fsdp2-x2": (2, {"strategy": "fsdp2"}),
    "fsdp2-x3": (3, {"strategy": "fsdp2"}),
    "divided-1x2": (2, {"strategy": "fsdp2", "tensor_parallel": 2}),
    "divided-2x2": (4, {"strategy": "fsdp2", "tensor_parallel": 2}),
    "divided-1x4": (4, {"strategy": "fsdp2", "tensor_parallel": 4}),
    "hsdp-2x2": (4, {"strategy": "hsdp", "shard_ranks": 2}),
    "zero3-x2": (2, {"strategy": "zero3"}),
}


def all_changes(seed: int) -> list[str]:
    """Return a chain of places, random by `seed`, in which each place follows each other one once."""
    draw = random.Random(seed)
    left = {place: draw.sample([other for other in PLACES if other != place], len(PLACES) - 1) for place in PLACES}
    path, chain = ["single"], []
    while path:  # Hierholzer's circuit of all edges
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            chain.append(path.pop())
    return chain[::-1]


def problems(chain: Sequence[str], folder: Path, *, kind: str) -> Iterator[tuple[str, str, float]]:
    """Run the chain; yield for each change its name, what is wrong ("" if nothing), and how far the loss is off."""
    options: dict[str, Any] = {"kind": kind, "max_steps": len(chain), "save_every": 1, "eval_every": 1000, "keep": 0}
    fit(Tokens, output_dir=folder / "whole", **options)
    expected = losses(folder / "whole")
    for number, place in enumerate(chain):
        num_ranks, words = PLACES[place]
        before, run_dir = folder / str(number - 1), folder / str(number)
        resumed = {"resume": str(_step_dir(before, number))} if number else {}
        run_on_ranks(num_ranks, _step, run_dir, {**options, **words, **resumed, "stop_at_step": number + 1})
        found = _what_differs(_step_dir(before, number), _step_dir(run_dir, number)) if number else ""
        found = found or _what_differs(
            _step_dir(folder / "whole", number + 1), _step_dir(run_dir, number + 1), has_same_values=False
        )
        difference = abs(losses(run_dir)[number + 1] - expected[number + 1])
        if not difference <= BOUND:
            found = found or f"a loss is off by {difference:.1e}"
        yield f"{chain[number - 1] if number else 'start'} to {place}", found, difference


def _step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08}"


def _step(run_dir: Path, options: dict[str, Any]) -> None:
    """Save what was read, and train on. All ranks."""
    prepare = Run.prepare

    def prepare_and_save(run: Run) -> None:
        prepare(run)
        if run.position.step:
            run.saver.save(run.position, run.assembly)
        run.saver.wait()

    with patch.object(Run, "prepare", prepare_and_save):
        fit(Tokens, output_dir=run_dir, **options)


def _what_differs(one: Path, other: Path, *, has_same_values: bool = True) -> str:
    """Compare the files of two checkpoints: names, sizes, tensors, and unless told otherwise every byte."""
    files, others = ({path.name: path for path in step_dir.glob("*.safetensors")} for step_dir in (one, other))
    if not files or files.keys() != others.keys():
        return f"files {sorted(files)} and {sorted(others)}"
    for name, path in files.items():
        if path.stat().st_size != others[name].stat().st_size:
            return f"{name} has {path.stat().st_size} and {others[name].stat().st_size} bytes"
        with safe_open(path, "pt") as tensors, safe_open(others[name], "pt") as other_tensors:
            if sorted(tensors.keys()) != sorted(other_tensors.keys()):
                return f"{name} has other tensors"
            for key in tensors.keys():  # noqa: SIM118 - no dict
                tensor, its_other = tensors.get_tensor(key), other_tensors.get_tensor(key)
                if (tensor.shape, tensor.dtype) != (its_other.shape, its_other.dtype):
                    return f"{key} has another shape or dtype"
                if has_same_values and not torch.equal(tensor, its_other):
                    return f"{key} was read and saved with other bits"
    return ""

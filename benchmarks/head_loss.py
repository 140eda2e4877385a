"""What --chunked-loss saves: peak memory and CPU time of a language model's output layer and loss, and of its backward.

    python benchmarks/head_loss.py

The work: random hidden states of some tokens, one thread, fp32; a linear output layer without bias and the sum of the
losses. Arms: all logits at once, and some tokens at a time inside the layer. Each measurement is a process of its own,
which takes three steps and tells the least CPU time of a step, and how far its peak of resident memory is above what it
had before, without the gradients of states and weights, which both arms keep. Arms take turns, in another order each
round.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from record import machine, spread, versions, write_result

PLAIN, CHUNKED = "all logits", "--chunked-loss"
ARMS = {PLAIN: "plain", CHUNKED: "chunked"}
SIZES = [(2048, 8192, 384), (2048, 50_257, 768), (2048, 128_256, 512)]
STEPS = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="of the sizes, how many")
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.arm:
        print(json.dumps(_measured(arguments.arm[0], *map(int, arguments.arm[1:]))))
        return
    rows = []
    for size in SIZES[: arguments.sizes]:
        found: dict[str, list[dict[str, float]]] = {PLAIN: [], CHUNKED: []}
        for round_number in range(arguments.rounds):
            for arm in random.Random(round_number).sample(list(found), len(found)):
                words = [sys.executable, __file__, "--arm", ARMS[arm], *map(str, size)]
                ended = subprocess.run(words, capture_output=True, text=True, check=True)
                found[arm].append(json.loads(ended.stdout))
        rows.append(_row(size, found))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.result:
        result = {
            "benchmark": "head_loss",
            "rounds": arguments.rounds,
            "rows": rows,
            "note": "",
            "machine": machine(),
            "versions": versions("torch"),
        }
        write_result(arguments.result, result)


def _measured(arm: str, num_tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    from shardlaunch.text import prepare_head, sum_of_losses

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Model(nn.Module):
        """An output layer alone, as a language model of transformers has it."""

        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.head = nn.Linear(width, vocabulary, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, states: torch.Tensor, *, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(states))

    def step(model: Model, states: torch.Tensor, targets: torch.Tensor) -> float:
        states.grad = model.head.weight.grad = None
        begun = time.process_time()
        if arm == ARMS[CHUNKED]:
            loss = sum_of_losses(model, targets, states=states)
        else:
            loss = F.cross_entropy(
                model(states, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum"
            )
        loss.backward()
        return time.process_time() - begun

    def parts(num_tokens: int, vocabulary: int) -> tuple[Model, torch.Tensor, torch.Tensor]:
        model = Model(vocabulary)
        if arm == ARMS[CHUNKED]:
            prepare_head(model)
        states = torch.randn(1, num_tokens, width, requires_grad=True)
        return model, states, torch.randint(vocabulary, (1, num_tokens))

    step(*parts(64, 64))  # what libraries allocate once
    model, states, targets = parts(num_tokens, vocabulary)
    before = _peak_mb(reset=True)
    times = [step(model, states, targets) for _ in range(STEPS)]
    gradients = 4 * (states.numel() + model.head.weight.numel()) / 2**20
    return {"mb": _peak_mb() - before - gradients, "s": min(times)}


def _peak_mb(*, reset: bool = False) -> float:
    """Return the peak of this process's resident memory, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def _row(size: tuple[int, int, int], found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    pairs = list(zip(found[CHUNKED], found[PLAIN], strict=True))
    return {
        "tokens": size[0],
        "vocabulary": size[1],
        "width": size[2],
        "mb": {arm: spread([each["mb"] for each in its], 0) for arm, its in found.items()},
        "s": {arm: spread([each["s"] for each in its], 2) for arm, its in found.items()},
        "memory": spread([chunked["mb"] / plain["mb"] for chunked, plain in pairs], 2),
        "time": spread([chunked["s"] / plain["s"] for chunked, plain in pairs], 2),
    }


if __name__ == "__main__":
    main()
